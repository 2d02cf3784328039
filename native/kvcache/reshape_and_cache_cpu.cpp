// Keys and values into the paged cache on the CPU, in the flash and the packed layout.
#include <vector>

#include "kvcache/cache.h"
#include "kvcache/runs_cpu.h"
#include "prim/cpu_parallel.h"

namespace kvcache {
namespace {

struct Side {
  void* cache;
  int64_t block_stride, page_stride, head_stride;
  const float* scale;
};

template <class T>
void store_flash(const ReshapeAndCacheFlashArgs& a, const Side& side, const T* src, int64_t slot) {
  const int64_t item = cache_item(a.dtype, a.format), d = a.head_size;
  char* at = static_cast<char*>(side.cache) + item * (slot / a.block_size * side.block_stride +
                                                      slot % a.block_size * side.page_stride);
  const bool scaled = a.format != KvFormat::kCopy;
  if (side.head_stride == d && a.scale_stride == 0) {  // the heads lie together
    store_run(at, src, a.heads * d, a.format, scaled ? side.scale[0] : 1.0f);
    return;
  }
  for (int64_t h = 0; h < a.heads; ++h) {
    const float scale = scaled ? side.scale[h * a.scale_stride] : 1.0f;
    store_run(at + h * side.head_stride * item, src + h * d, d, a.format, scale);
  }
}

template <class T>
void run(const ReshapeAndCacheFlashArgs& a) {
  const Side key{a.key_cache, a.key_block_stride, a.key_page_stride, a.key_head_stride, a.k_scale};
  const Side value{a.value_cache, a.value_block_stride, a.value_page_stride, a.value_head_stride,
                   a.v_scale};
  cpu::parallel_for(a.tokens, 4 * sizeof(T) * a.heads * a.head_size, [&](int64_t t) {
    const int64_t slot = a.slots[t];
    if (slot < 0 || slot >= a.num_blocks * a.block_size) return;
    store_flash(a, key, static_cast<const T*>(a.key) + t * a.key_stride, slot);
    store_flash(a, value, static_cast<const T*>(a.value) + t * a.value_stride, slot);
  });
}

// One token into the packed layout; C is the item of the cache, `row` the converted elements.
template <class C>
void scatter_key(const ReshapeAndCacheArgs& a, const C* row, int64_t block, int64_t off) {
  const int64_t chunks = a.head_size / a.x;
  C* at = static_cast<C*>(a.key_cache) + (block * a.heads * chunks * a.block_size + off) * a.x;
  for (int64_t c = 0; c < a.heads * chunks; ++c) {
    std::memcpy(at + c * a.block_size * a.x, row + c * a.x, 16);
  }
}

template <class C>
void scatter_value(const ReshapeAndCacheArgs& a, const C* row, int64_t block, int64_t off) {
  const int64_t n = a.heads * a.head_size;
  C* at = static_cast<C*>(a.value_cache) + block * n * a.block_size;
  if (!a.interleaved_v) {
    for (int64_t i = 0; i < n; ++i) at[i * a.block_size + off] = row[i];
    return;
  }
  at += off / a.x * a.head_size * a.x + off % a.x;
  for (int64_t h = 0; h < a.heads; ++h) {
    for (int64_t d = 0; d < a.head_size; ++d) {
      at[h * a.head_size * a.block_size + d * a.x] = row[h * a.head_size + d];
    }
  }
}

template <class T, class C>
void run(const ReshapeAndCacheArgs& a) {
  const int64_t n = a.heads * a.head_size;
  cpu::parallel_for(a.tokens, 4 * sizeof(T) * n, [&](int64_t t) {
    const int64_t slot = a.slots[t];
    if (slot < 0 || slot >= a.num_blocks * a.block_size) return;
    const int64_t block = slot / a.block_size, off = slot % a.block_size;
    const T* key = static_cast<const T*>(a.key) + t * a.key_stride;
    const T* value = static_cast<const T*>(a.value) + t * a.value_stride;
    if (a.format == KvFormat::kCopy) {
      scatter_key(a, reinterpret_cast<const C*>(key), block, off);
      scatter_value(a, reinterpret_cast<const C*>(value), block, off);
      return;
    }
    thread_local std::vector<uint8_t> codes;
    codes.resize(n);
    store_run(codes.data(), key, n, a.format, *a.k_scale);
    scatter_key(a, reinterpret_cast<const C*>(codes.data()), block, off);
    store_run(codes.data(), value, n, a.format, *a.v_scale);
    scatter_value(a, reinterpret_cast<const C*>(codes.data()), block, off);
  });
}

}  // namespace

void reshape_and_cache_flash(const ReshapeAndCacheFlashArgs& a, Stream /*stream*/) {
  with_float(a.dtype, [&](auto type) { run<decltype(type)>(a); });
}

void reshape_and_cache(const ReshapeAndCacheArgs& a, Stream /*stream*/) {
  with_float(a.dtype, [&](auto type) {
    using T = decltype(type);
    a.format == KvFormat::kCopy ? run<T, T>(a) : run<T, uint8_t>(a);
  });
}

}  // namespace kvcache
