// Keys and values into a cache of logical shape [NB, BS, H, D] on the GPU. A thread keeps its place
// in the row and takes a token or two, key and value of each: all loads are in flight before the
// first store.
#include "kvcache/cache.h"
#include "prim/gpu_fp8.h"

namespace kvcache {
namespace {

// Keys or values, with strides in bytes. Stride is uint32_t where all of them and the slots fit:
// an address then is a few products of 32 bits.
template <class Stride>
struct Side {
  const char* in;
  char* cache;
  const float* scale;
  Stride token, block, page, head;  // token: of `in`
};

template <class Stride>
struct Rows {
  Side<Stride> key, value;
  const int64_t* slots;
  Stride tokens, slot_count;
  int head_size, scale_stride;
  gpu::FastDivisor head_vecs, row_vecs, block_size;
  uint32_t rows_at_once;
};

template <class T, KvFormat kFormat, class Stride, bool kAligned, int kTokens, int kThreads,
          int kMinBlocks>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    write_flash(const __grid_constant__ Rows<Stride> a) {
  gpu::launch_dependents();
  using Write = gpu::Quantizer<kFormat, T>;
  using C = typename Write::Item;
  constexpr int kN = gpu::kVec<T>;
  // Rows side by side in a block, or blockIdx.y the part of one.
  const uint32_t all = a.row_vecs.divisor, sub = a.row_vecs.quotient(threadIdx.x);
  const uint32_t vec = blockIdx.y * kThreads + threadIdx.x - sub * all;
  const bool idle = sub >= a.rows_at_once || vec >= all;
  const Stride first = static_cast<Stride>(blockIdx.x) * (kTokens * a.rows_at_once) + sub;
  const uint32_t head = idle ? 0 : a.head_vecs.quotient(vec);
  const uint32_t d = (vec - head * a.head_vecs.divisor) * kN;
  const uint32_t column = kAligned ? vec * kN : head * a.head_size + d;
  const int n = min(a.head_size - static_cast<int>(d), kN);
  auto in = [&](const Side<Stride>& side, Stride t) {
    return reinterpret_cast<const T*>(side.in + static_cast<uint64_t>(t) * side.token) + column;
  };
  if (kAligned && !idle && gpu::starts_early()) {
#pragma unroll
    for (int u = 0; u < kTokens; ++u) {
      const Stride t = min(first + u * a.rows_at_once, a.tokens - 1);
      gpu::prefetch(a.slots + t);
      gpu::prefetch(in(a.key, t));
      gpu::prefetch(in(a.value, t));
    }
  }
  gpu::dependency_wait();
  gpu::Kept<gpu::Vec<T, kN>> k[kTokens], v[kTokens];
  int64_t slot[kTokens];
#pragma unroll
  for (int u = 0; u < kTokens; ++u) {
    const Stride t = first + u * a.rows_at_once;
    slot[u] = -1;
    if (t >= a.tokens || idle) continue;
    slot[u] = a.slots[t];
    // The row exists whatever its slot: load it while the slot is on its way.
    gpu::load<kAligned>(k[u], in(a.key, t), n);
    gpu::load<kAligned>(v[u], in(a.value, t), n);
  }
  const uint32_t s = head * a.scale_stride;
  const float key_scale = kFormat == KvFormat::kCopy ? 1.0f : a.key.scale[s];
  const float value_scale = kFormat == KvFormat::kCopy ? 1.0f : a.value.scale[s];
  const auto [write_key, write_value] =
      Write::for_warps(key_scale, value_scale, a.scale_stride == 0);
#pragma unroll
  for (int u = 0; u < kTokens; ++u) {
    if (static_cast<uint64_t>(slot[u]) >= a.slot_count) continue;
    const auto place = gpu::place_of(static_cast<Stride>(slot[u]), a.block_size);
    auto out = [&](const Side<Stride>& side) {
      return reinterpret_cast<C*>(side.cache + static_cast<uint64_t>(place.block) * side.block +
                                  static_cast<uint64_t>(place.offset) * side.page +
                                  static_cast<uint64_t>(head) * side.head) +
             d;
    };
    gpu::store<kAligned>(out(a.key), write_key(k[u]), n);
    gpu::store<kAligned>(out(a.value), write_value(v[u]), n);
  }
}

// A few tokens into a cache of the same dtype, whole rows of aligned vectors: a block takes the key
// or the value of one, a thread per vector. What counts here is how soon the loads are on their way
// and how little follows them, parameters included. Strides in bytes.
struct FewRows {
  struct Side {
    const char* in;
    char* cache;
    uint32_t token, block, page;
  } sides[2];
  const int64_t* slots;
  uint32_t slot_count;
  gpu::FastDivisor block_size;
};

// Only for grids that start after their predecessor: it waits for nothing.
__global__ void write_few(const __grid_constant__ FewRows a) {
  const uint32_t token = blockIdx.x, at = threadIdx.x * 16;
  const FewRows::Side& side = a.sides[blockIdx.y];
  const uint64_t slot = gpu::ld_relaxed_gpu(a.slots + token);
  const char* from = side.in + static_cast<uint64_t>(token) * side.token + at;
  const uint4 v = gpu::ld_relaxed_gpu(reinterpret_cast<const uint4*>(from));
  if (slot >= a.slot_count) return;
  const auto place = gpu::place_of(static_cast<uint32_t>(slot), a.block_size);
  char* to = side.cache + static_cast<uint64_t>(place.block) * side.block +
             static_cast<uint64_t>(place.offset) * side.page + at;
  *reinterpret_cast<uint4*>(to) = v;
}

// Launches write_few and returns true where it applies; else does nothing.
bool launch_few(const ReshapeAndCacheFlashArgs& a, int64_t item, gpu::Stream stream) {
  const int64_t vecs = a.heads * a.head_size * item / 16;
  const bool whole =
      a.heads == 1 || (a.key_head_stride == a.head_size && a.value_head_stride == a.head_size);
  if (!whole || 2 * a.tokens >= gpu::kSmallGrid || vecs > 1024) return false;
  auto bytes = [&](int64_t elements) { return static_cast<uint32_t>(elements * item); };
  const FewRows args = {
      {{static_cast<const char*>(a.key), static_cast<char*>(a.key_cache), bytes(a.key_stride),
        bytes(a.key_block_stride), bytes(a.key_page_stride)},
       {static_cast<const char*>(a.value), static_cast<char*>(a.value_cache), bytes(a.value_stride),
        bytes(a.value_block_stride), bytes(a.value_page_stride)}},
      a.slots,
      static_cast<uint32_t>(a.num_blocks * a.block_size),
      gpu::FastDivisor(a.block_size)};
  gpu::launch_overlapped("reshape_and_cache_flash", write_few,
                         dim3(static_cast<unsigned>(a.tokens), 2), static_cast<int>(vecs), stream,
                         args);
  return true;
}

// A launch: kTokens tokens per thread.
template <class T, KvFormat kFormat, class Stride, bool kAligned, int kTokens, int kThreads,
          int kMinBlocks>
void launch(const ReshapeAndCacheFlashArgs& a, gpu::Stream stream) {
  constexpr int64_t kIn = sizeof(T), kOut = sizeof(gpu::CacheItem<kFormat, T>);
  const int head_vecs = static_cast<int>(gpu::ceil_div(a.head_size, gpu::kVec<T>));
  const int row_vecs = head_vecs * static_cast<int>(a.heads);
  const int rows = row_vecs <= kThreads ? kThreads / row_vecs : 1;
  auto stride = [](int64_t elements, int64_t size) { return static_cast<Stride>(elements * size); };
  const Rows<Stride> args = {
      {static_cast<const char*>(a.key), static_cast<char*>(a.key_cache), a.k_scale,
       stride(a.key_stride, kIn), stride(a.key_block_stride, kOut), stride(a.key_page_stride, kOut),
       stride(a.key_head_stride, kOut)},
      {static_cast<const char*>(a.value), static_cast<char*>(a.value_cache), a.v_scale,
       stride(a.value_stride, kIn), stride(a.value_block_stride, kOut),
       stride(a.value_page_stride, kOut), stride(a.value_head_stride, kOut)},
      a.slots,
      static_cast<Stride>(a.tokens),
      static_cast<Stride>(a.num_blocks * a.block_size),
      static_cast<int>(a.head_size),
      static_cast<int>(a.scale_stride),
      gpu::FastDivisor(head_vecs),
      gpu::FastDivisor(row_vecs),
      gpu::FastDivisor(a.block_size),
      static_cast<uint32_t>(rows)};
  const dim3 grid(static_cast<unsigned>(gpu::ceil_div(a.tokens, rows * kTokens)),
                  static_cast<unsigned>(gpu::ceil_div(row_vecs, kThreads)));
  gpu::launch_overlapped("reshape_and_cache_flash",
                         write_flash<T, kFormat, Stride, kAligned, kTokens, kThreads, kMinBlocks>,
                         grid, kThreads, stream, args);
}

}  // namespace

void reshape_and_cache_flash(const ReshapeAndCacheFlashArgs& a, Stream stream) {
  if (a.heads * a.head_size == 0) return;
  gpu::with_float(a.dtype, [&](auto type) {
    gpu::with_format(a.format, [&](auto format) {
      using T = decltype(type);
      constexpr KvFormat kFormat = decltype(format)::value;
      constexpr int64_t kIn = sizeof(T), kOut = sizeof(gpu::CacheItem<kFormat, T>);
      constexpr int kN = gpu::kVec<T>;
      const gpu::Stream s = gpu::stream_of(stream);
      const bool aligned =
          a.head_size % kN == 0 &&
          gpu::aligned(16, a.key, a.value, a.key_stride * kIn, a.value_stride * kIn) &&
          gpu::aligned(kOut * kN, a.key_cache, a.value_cache, a.key_block_stride * kOut,
                       a.key_page_stride * kOut, a.key_head_stride * kOut,
                       a.value_block_stride * kOut, a.value_page_stride * kOut,
                       a.value_head_stride * kOut);
      const bool narrow = gpu::narrow(
          a.tokens, a.num_blocks * a.block_size, a.key_stride * kIn, a.value_stride * kIn,
          a.key_block_stride * kOut, a.key_page_stride * kOut, a.key_head_stride * kOut,
          a.value_block_stride * kOut, a.value_page_stride * kOut, a.value_head_stride * kOut);
      if (!aligned || !narrow) return launch<T, kFormat, uint64_t, false, 1, 128, 1>(a, s);
      if constexpr (kFormat == KvFormat::kCopy) {
        if (launch_few(a, kIn, s)) return;
        launch<T, kFormat, uint32_t, true, 1, 128, 12>(a, s);
      } else {  // half of the bytes to write: more to read at a time
        launch<T, kFormat, uint32_t, true, 2, 64, 16>(a, s);
      }
    });
  });
}

}  // namespace kvcache
