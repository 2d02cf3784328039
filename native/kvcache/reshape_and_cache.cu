// Keys and values into the packed cache on the GPU. A block stages 16 tokens by a slice of columns
// in shared memory and writes them transposed: 8 tokens that follow each other in one cache block
// share a store of values; others are scattered item by item.
#include "kvcache/cache.h"
#include "prim/gpu_fp8.h"

namespace kvcache {
namespace {

constexpr int kThreads = 256, kTokens = 16, kRun = 8;
constexpr int kSliceBytes = 512;  // of cache items a token

template <class T, KvFormat kFormat, bool kAligned>
__global__ void __launch_bounds__(kThreads) write_packed(ReshapeAndCacheArgs a) {
  using Write = gpu::Quantizer<kFormat, T>;
  using C = typename Write::Item;
  constexpr int kN = gpu::kVec<T>, kX = 16 / sizeof(C);
  constexpr int kSlice = kSliceBytes / sizeof(C), kPitch = kSlice + kX;
  __shared__ __align__(16) C keys[kTokens * kPitch];
  __shared__ __align__(16) C values[kTokens * kPitch];
  __shared__ int64_t slots[kTokens];
  __shared__ bool together[kTokens / kRun];
  gpu::begin_overlapped();

  const int width = static_cast<int>(a.heads * a.head_size);
  const int first_col = blockIdx.y * kSlice, cols = min(kSlice, width - first_col);
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kTokens;
  const int64_t limit = a.num_blocks * a.block_size;
  if (threadIdx.x < kTokens) {
    const int64_t t = first_token + threadIdx.x;
    const int64_t slot = t < a.tokens ? a.slots[t] : -1;
    slots[threadIdx.x] = slot < limit ? slot : -1;
  }
  __syncthreads();
  if (threadIdx.x < kTokens / kRun) {
    const int64_t* run = slots + threadIdx.x * kRun;
    bool ok = sizeof(C) <= 2 && run[0] >= 0 && a.block_size % kRun == 0 && run[0] % kRun == 0;
    for (int i = 1; i < kRun; ++i) ok = ok && run[i] == run[0] + i;
    together[threadIdx.x] = ok;
  }
  const bool scaled = kFormat != KvFormat::kCopy;
  const auto [write_key, write_value] =
      Write::for_warps(scaled ? *a.k_scale : 1.0f, scaled ? *a.v_scale : 1.0f);
  const int vecs = (cols + kN - 1) / kN;
  for (int i = threadIdx.x; i < kTokens * vecs; i += kThreads) {
    const int token = i / vecs, col = (i - token * vecs) * kN, n = min(cols - col, kN);
    if (slots[token] < 0) continue;
    const int64_t t = first_token + token;
    gpu::Kept<gpu::Vec<T, kN>> k, v;
    gpu::load<kAligned>(k, static_cast<const T*>(a.key) + t * a.key_stride + first_col + col, n);
    gpu::load<kAligned>(v, static_cast<const T*>(a.value) + t * a.value_stride + first_col + col,
                        n);
    gpu::store<true>(keys + token * kPitch + col, write_key(k));
    gpu::store<true>(values + token * kPitch + col, write_value(v));
  }
  __syncthreads();

  // Keys: 16 bytes of a token, tokens side by side.
  const int d_size = static_cast<int>(a.head_size), bs = static_cast<int>(a.block_size);
  for (int i = threadIdx.x; i < kTokens * (cols / kX); i += kThreads) {
    const int token = i % kTokens, col = i / kTokens * kX;
    if (slots[token] < 0) continue;
    int64_t block, off;
    gpu::split_slot(slots[token], bs, block, off);
    C* at = static_cast<C*>(a.key_cache) +
            (block * (width / kX) + (first_col + col) / kX) * bs * kX + off * kX;
    *reinterpret_cast<uint4*>(at) = *reinterpret_cast<const uint4*>(keys + token * kPitch + col);
  }
  // Values: a column of 8 tokens.
  for (int i = threadIdx.x; i < kTokens / kRun * cols; i += kThreads) {
    const int run = i % (kTokens / kRun), col = i / (kTokens / kRun);
    const int column = first_col + col, head = column / d_size, d = column - head * d_size;
    const C* from = values + run * kRun * kPitch + col;
    auto place = [&](int64_t slot) {
      int64_t block, off;
      gpu::split_slot(slot, bs, block, off);
      C* base = static_cast<C*>(a.value_cache) + block * width * bs;
      return a.interleaved_v ? base + static_cast<int64_t>(head) * d_size * bs +
                                   (off / kX) * d_size * kX + d * kX + off % kX
                             : base + static_cast<int64_t>(column) * bs + off;
    };
    if (together[run]) {
      gpu::Vec<C, kRun> v;
#pragma unroll
      for (int j = 0; j < kRun; ++j) v.at[j] = from[j * kPitch];
      gpu::store<sizeof(C) <= 2>(place(slots[run * kRun]), v);
    } else {
      for (int j = 0; j < kRun; ++j) {
        const int64_t slot = slots[run * kRun + j];
        if (slot >= 0) *place(slot) = from[j * kPitch];
      }
    }
  }
}

}  // namespace

void reshape_and_cache(const ReshapeAndCacheArgs& a, Stream stream) {
  gpu::with_float(a.dtype, [&](auto type) {
    gpu::with_format(a.format, [&](auto format) {
      using T = decltype(type);
      constexpr KvFormat kFormat = decltype(format)::value;
      constexpr int kSlice = kSliceBytes / sizeof(gpu::CacheItem<kFormat, T>);
      const dim3 grid(static_cast<unsigned>(gpu::ceil_div(a.tokens, kTokens)),
                      static_cast<unsigned>(gpu::ceil_div(a.heads * a.head_size, kSlice)));
      const bool all = gpu::aligned(16, a.key, a.value, a.key_stride * sizeof(T),
                                    a.value_stride * sizeof(T), a.head_size * sizeof(T));
      gpu::with_bool(all, [&](auto is_aligned) {
        gpu::launch_overlapped("reshape_and_cache",
                               write_packed<T, kFormat, decltype(is_aligned)::value>, grid,
                               kThreads, gpu::stream_of(stream), a);
      });
    });
  });
}

}  // namespace kvcache
