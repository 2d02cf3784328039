// Keys and values into the paged cache of the packed layout on the CPU. There the tokens of a block
// lie side by side, so tokens that follow each other in a block are written together.
#include <algorithm>
#include <utility>
#include <vector>

#include "kvcache/cache.h"
#include "kvcache/runs_cpu.h"
#include "prim/cpu_parallel.h"

namespace kvcache {
namespace {

// A square of 16 bytes by as many rows, C being an item: row i of `in` becomes column i of `out`.
template <class C, int... j>
void transpose_square(C* out, int64_t out_stride, const C* in, int64_t in_stride,
                      std::integer_sequence<int, j...> /*items of a row*/) {
  constexpr int kSide = sizeof...(j);
  typedef C Row __attribute__((vector_size(16)));
  Row a[kSide], b[kSide];
  for (int i = 0; i < kSide; ++i) std::memcpy(a + i, in + i * in_stride, 16);
  // Each turn interleaves the first half of the rows with the second: after log2(kSide) turns, rows
  // are columns.
  for (int turn = kSide; turn > 1; turn /= 2) {
    for (int i = 0; i < kSide / 2; ++i) {
      b[2 * i] = SHUFFLED(Row, a[i], a[i + kSide / 2], (j / 2 + j % 2 * kSide)...);
      b[2 * i + 1] = SHUFFLED(Row, a[i], a[i + kSide / 2], (kSide / 2 + j / 2 + j % 2 * kSide)...);
    }
    std::copy_n(b, kSide, a);
  }
  for (int i = 0; i < kSide; ++i) std::memcpy(out + i * out_stride, a + i, 16);
}
template <class C>
void transpose_square(C* out, int64_t out_stride, const C* in, int64_t in_stride) {
  transpose_square(out, out_stride, in, in_stride,
                   std::make_integer_sequence<int, 16 / sizeof(C)>{});
}

// Rows of tokens, or none.
template <class C>
struct Rows {
  const C* first;
  int64_t stride;

  const C* row(int64_t i) const { return first + i * stride; }
  // Prefetches the cache line that holds item j of row i, if that is its first: so many streams at
  // once are more than the processor follows by itself.
  void ask(int64_t i, int64_t j) const {
    constexpr int64_t kItems = cpu::kLine / sizeof(C);
    if (first != nullptr && j % kItems == 0) __builtin_prefetch(row(i) + j, 0, 2);
  }
};

constexpr int64_t kTokens = 16;  // of a block that is written as a whole

namespace whole {  // beside the lanes of runs_cpu.h
#define LANES_KERNEL "kvcache/packed_lanes.h"
#include "prim/cpu_each_isa.h"

// kKeys tells which.
template <bool kKeys, cpu::Stores kStores, class C>
void write(C* block, const Rows<C>& rows, const Rows<C>& next, int64_t n) {
  if constexpr (kKeys) {
    PICK_ISA(keys_of_block<kStores, C>)(block, rows, next, n);
  } else {
    PICK_ISA(values_of_block<kStores, C>)(block, rows, next, n);
  }
}
}  // namespace whole

// Tokens side by side in one block, their rows of n = heads * head_size items of the cache.
template <class C>
struct Tokens {
  Rows<C> rows;
  int64_t count, block, off;
  Rows<C> next;  // as many rows that are read after these

  void ask_ahead(int64_t j) const {
    for (int64_t i = 0; i < count; ++i) next.ask(i, j);
  }
};

template <class C>
void scatter_keys(const ReshapeAndCacheArgs& a, const Tokens<C>& t) {
  const int64_t chunks = a.heads * a.head_size / a.x;
  C* at = static_cast<C*>(a.key_cache) + (t.block * chunks * a.block_size + t.off) * a.x;
  for (int64_t c = 0; c < chunks; ++c, at += a.block_size * a.x) {
    t.ask_ahead(c * a.x);
    for (int64_t i = 0; i < t.count; ++i) {
      std::memcpy(at + i * a.x, t.rows.row(i) + c * a.x, 16);
    }
  }
}

template <class C>
void scatter_values(const ReshapeAndCacheArgs& a, const Tokens<C>& t) {
  constexpr int64_t kSide = 16 / sizeof(C);
  const int64_t d = a.head_size, n = a.heads * d;
  C* block = static_cast<C*>(a.value_cache) + t.block * n * a.block_size;
  for (int64_t i = 0; i < t.count;) {
    const int64_t off = t.off + i;
    // Where the first item of a head goes, and how far apart its items are.
    const int64_t step = a.interleaved_v ? kSide : a.block_size;
    C* at = block + (a.interleaved_v ? off / kSide * d * kSide + off % kSide : off);
    const C* row = t.rows.row(i);
    const bool square = t.count - i >= kSide && (!a.interleaved_v || off % kSide == 0);
    for (int64_t h = 0; h < a.heads; ++h, at += d * a.block_size, row += d) {
      int64_t j = 0;
      if (square) {
        for (; j + kSide <= d; j += kSide) {
          if (i == 0) t.ask_ahead(h * d + j);
          transpose_square(at + j * step, step, row + j, t.rows.stride);
        }
      }
      for (; j < d; ++j) {
        for (int64_t k = 0; k < (square ? kSide : 1); ++k) {
          at[j * step + k] = row[k * t.rows.stride + j];
        }
      }
    }
    i += square ? kSide : 1;
  }
}

// Keys or values, as whole lines where the tokens fill a block of 16.
template <bool kKeys, cpu::Stores kStores, class C>
void scatter(const ReshapeAndCacheArgs& a, const Tokens<C>& t) {
  const int64_t n = a.heads * a.head_size;
  C* block = static_cast<C*>(kKeys ? a.key_cache : a.value_cache) + t.block * n * a.block_size;
  const bool fills = t.count == kTokens && a.block_size == kTokens;
  if (fills && n * sizeof(C) % 64 == 0 && (kKeys || !a.interleaved_v)) {
    return whole::write<kKeys, kStores>(block, t.rows, t.next, n);
  }
  kKeys ? scatter_keys(a, t) : scatter_values(a, t);
}

// How many of the tokens [t, end) follow each other in the block of token t.
int64_t side_by_side(const ReshapeAndCacheArgs& a, int64_t t, int64_t end) {
  end = std::min(end, t + a.block_size - a.slots[t] % a.block_size);
  int64_t i = t + 1;
  while (i < end && a.slots[i] == a.slots[i - 1] + 1) ++i;
  return i - t;
}

// Prefetches cache lines that will be written soon.
inline void ask_to_write(const void* at, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += cpu::kLine) {
    __builtin_prefetch(static_cast<const char*>(at) + i, 1);
  }
}

// T is what the tokens hold, C what the cache does: the same for a copy.
template <cpu::Stores kStores, class T, class C>
void write(const ReshapeAndCacheArgs& a, int64_t t, int64_t count) {
  const int64_t n = a.heads * a.head_size;
  const int64_t block = a.slots[t] / a.block_size, off = a.slots[t] % a.block_size;
  const Rows<T> key{static_cast<const T*>(a.key) + t * a.key_stride, a.key_stride};
  const Rows<T> value{static_cast<const T*>(a.value) + t * a.value_stride, a.value_stride};
  if constexpr (std::is_same_v<T, C>) {
    scatter<true, kStores>(a, Tokens<C>{key, count, block, off, value});
    scatter<false, kStores>(a, Tokens<C>{value, count, block, off, {key.row(count), key.stride}});
  } else {
    thread_local std::vector<C> codes;
    codes.resize(count * n);
    const auto quantize = [&](const Rows<T>& rows, const float* scale, void* cache) {
      const C* at = static_cast<const C*>(cache) + (block * a.block_size + off) * n;
      for (int64_t i = 0; i < count; ++i, at += n) {
        if (kStores == cpu::Stores::kCached) {
          ask_to_write(at, n);  // of a whole block, what the codes of one token fill
        }
        store_run(codes.data() + i * n, rows.row(i), n, a.format, *scale);
      }
      return Tokens<C>{{codes.data(), n}, count, block, off, {nullptr, 0}};
    };
    scatter<true, kStores>(a, quantize(key, a.k_scale, a.key_cache));
    scatter<false, kStores>(a, quantize(value, a.v_scale, a.value_cache));
  }
}

template <cpu::Stores kStores, class T, class C>
void run_storing(const ReshapeAndCacheArgs& a) {
  // A task is some tokens: enough for whole squares, few enough for every thread to have some.
  const int64_t share = a.tokens >= 1024 ? 64 : 16;
  const int64_t tasks = (a.tokens + share - 1) / share;
  const int64_t cost = 4 * sizeof(T) * a.heads * a.head_size * share;
  cpu::parallel_spans(tasks, cost, [&](int64_t task, int64_t last) {
    const int64_t end = std::min(a.tokens, last * share);
    for (int64_t t = task * share; t < end;) {
      if (a.slots[t] < 0 || a.slots[t] >= a.num_blocks * a.block_size) {
        ++t;
        continue;
      }
      const int64_t count = side_by_side(a, t, end);
      write<kStores, T, C>(a, t, count);
      t += count;
    }
    if constexpr (kStores == cpu::Stores::kStreamed) cpu::finish_streaming();
  });
}

template <class T, class C>
void run(const ReshapeAndCacheArgs& a) {
  const int64_t row = a.heads * a.head_size * sizeof(C);
  const int64_t moved = 2 * a.tokens * a.heads * a.head_size * (sizeof(T) + sizeof(C));
  const bool streams = cpu::beyond_caches(moved) && cpu::on_lines(a.key_cache, {16 * row}) &&
                       cpu::on_lines(a.value_cache, {16 * row});
  return streams ? run_storing<cpu::Stores::kStreamed, T, C>(a)
                 : run_storing<cpu::Stores::kCached, T, C>(a);
}

}  // namespace

void reshape_and_cache(const ReshapeAndCacheArgs& a, Stream /*stream*/) {
  // Copies move bits: as integers, which vectors can be made of.
  if (a.format == KvFormat::kCopy) {
    return size_of(a.dtype) == 4 ? run<uint32_t, uint32_t>(a) : run<uint16_t, uint16_t>(a);
  }
  with_float(a.dtype, [&](auto type) { run<decltype(type), uint8_t>(a); });
}

}  // namespace kvcache
