// Keys and values into a cache of logical shape [NB, BS, H, D] on the GPU. A thread keeps its place
// in the row and takes a token or two, key and value of each: all loads are in flight before the
// first store.
#include "kvcache/cache.h"
#include "kvcache/runs.cuh"

namespace kvcache {
namespace {

template <class T, KvFormat kFormat, bool kAligned, int kTokens, int kThreads, int kMinBlocks>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    write_flash(ReshapeAndCacheFlashArgs a, gpu::FastDivisor head_vecs, gpu::FastDivisor row_vecs,
                gpu::FastDivisor block_size, int rows_at_once) {
  gpu::launch_dependents();
  using C = CacheItemT<T, kFormat>;
  constexpr int kN = gpu::kVec<T>;
  const int sub = row_vecs.quotient(threadIdx.x), all = static_cast<int>(row_vecs.divisor);
  if (all <= kThreads && sub >= rows_at_once) return;
  const int64_t limit = a.num_blocks * a.block_size;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTokens * rows_at_once + sub;
  if constexpr (kAligned) {
    const int64_t at = (static_cast<int64_t>(threadIdx.x) - sub * all) * kN;
#pragma unroll
    for (int u = 0; u < kTokens; ++u) {
      const int64_t t = min(first + u * rows_at_once, a.tokens - 1);
      gpu::prefetch_early(a.slots + t);
      gpu::prefetch_early(static_cast<const T*>(a.key) + t * a.key_stride + at);
      gpu::prefetch_early(static_cast<const T*>(a.value) + t * a.value_stride + at);
    }
  }
  gpu::dependency_wait();
  for (int vec = static_cast<int>(threadIdx.x) - sub * all; vec < all; vec += kThreads) {
    const int head = head_vecs.quotient(vec), d = (vec - head * head_vecs.divisor) * kN;
    const int n = min(static_cast<int>(a.head_size) - d, kN);
    const T* key = static_cast<const T*>(a.key) + head * a.head_size + d;
    const T* value = static_cast<const T*>(a.value) + head * a.head_size + d;
    gpu::Kept<gpu::Vec<T, kN>> k[kTokens], v[kTokens];
    int64_t slot[kTokens];
#pragma unroll
    for (int u = 0; u < kTokens; ++u) {
      const int64_t t = first + u * rows_at_once;
      slot[u] = t < a.tokens ? a.slots[t] : -1;
      if (t >= a.tokens) continue;
      // The row exists whatever its slot: load it while the slot is on its way.
      gpu::load<kAligned>(k[u], key + t * a.key_stride, n);
      gpu::load<kAligned>(v[u], value + t * a.value_stride, n);
    }
    const int s = head * static_cast<int>(a.scale_stride);
    const gpu::Divisor k_divisor(kFormat == KvFormat::kCopy ? 1.0f : a.k_scale[s]);
    const gpu::Divisor v_divisor(kFormat == KvFormat::kCopy ? 1.0f : a.v_scale[s]);
#pragma unroll
    for (int u = 0; u < kTokens; ++u) {
      if (slot[u] < 0 || slot[u] >= limit) continue;
      int64_t block, off;
      gpu::split_slot(slot[u], a.block_size, block_size, block, off);
      C* key_at = static_cast<C*>(a.key_cache) + block * a.key_block_stride +
                  off * a.key_page_stride + head * a.key_head_stride + d;
      C* value_at = static_cast<C*>(a.value_cache) + block * a.value_block_stride +
                    off * a.value_page_stride + head * a.value_head_stride + d;
      gpu::store<kAligned>(key_at, convert<T, kFormat>(k[u].get(), k_divisor), n);
      gpu::store<kAligned>(value_at, convert<T, kFormat>(v[u].get(), v_divisor), n);
    }
  }
}

// A launch: kTokens tokens a thread.
template <class T, KvFormat kFormat, bool kAligned, int kTokens, int kThreads, int kMinBlocks>
void launch(const ReshapeAndCacheFlashArgs& a, gpu::Stream stream) {
  const int head_vecs = static_cast<int>(gpu::ceil_div(a.head_size, gpu::kVec<T>));
  const int row_vecs = head_vecs * static_cast<int>(a.heads);
  const int rows = row_vecs <= kThreads ? kThreads / row_vecs : 1;
  const dim3 grid(static_cast<unsigned>(gpu::ceil_div(a.tokens, rows * kTokens)));
  gpu::launch_overlapped("reshape_and_cache_flash",
                         write_flash<T, kFormat, kAligned, kTokens, kThreads, kMinBlocks>, grid,
                         kThreads, stream, a, gpu::FastDivisor(head_vecs),
                         gpu::FastDivisor(row_vecs), gpu::FastDivisor(a.block_size), rows);
}

}  // namespace

void reshape_and_cache_flash(const ReshapeAndCacheFlashArgs& a, Stream stream) {
  if (a.heads * a.head_size == 0) return;
  gpu::with_float(a.dtype, [&](auto type) {
    gpu::with_format(a.format, [&](auto format) {
      using T = decltype(type);
      constexpr KvFormat kFormat = decltype(format)::value;
      constexpr int64_t kIn = sizeof(T), kOut = sizeof(CacheItemT<T, kFormat>);
      constexpr int kN = gpu::kVec<T>;
      const bool all = a.head_size % kN == 0 &&
                       gpu::aligned(16, a.key, a.value, a.key_stride * kIn, a.value_stride * kIn) &&
                       gpu::aligned(kOut * kN, a.key_cache, a.value_cache,
                                    a.key_block_stride * kOut, a.key_page_stride * kOut,
                                    a.key_head_stride * kOut, a.value_block_stride * kOut,
                                    a.value_page_stride * kOut, a.value_head_stride * kOut);
      gpu::with_bool(all, [&](auto is_aligned) {
        constexpr bool kAligned = decltype(is_aligned)::value;
        const gpu::Stream s = gpu::stream_of(stream);
        // Codes: two tokens a thread share what it knows of its place and of the scales.
        if (kFormat == KvFormat::kCopy || a.tokens * a.heads * a.head_size < 1 << 21) {
          launch<T, kFormat, kAligned, 1, 128, 12>(a, s);
        } else {
          launch<T, kFormat, kAligned, 2, 64, 16>(a, s);
        }
      });
    });
  });
}

}  // namespace kvcache
