// Keys and values into a cache of logical shape [NB, BS, H, D] on the GPU. A thread keeps its place
// in the row and takes a few tokens, key and value of each: all loads are in flight before the
// first store.
#include "kvcache/cache.h"
#include "kvcache/runs.cuh"

namespace kvcache {
namespace {

constexpr int kThreads = 256;

template <class T, KvFormat kFormat, bool kAligned, int kTokens>
__global__ void __launch_bounds__(kThreads, 4)
    write_flash(ReshapeAndCacheFlashArgs a, int head_vecs, int row_vecs, int rows_at_once) {
  using C = CacheItemT<T, kFormat>;
  constexpr int kN = gpu::kVec<T>;
  const int sub = threadIdx.x / row_vecs;
  if (row_vecs <= kThreads && sub >= rows_at_once) return;
  const int64_t limit = a.num_blocks * a.block_size;
  for (int vec = threadIdx.x % row_vecs; vec < row_vecs; vec += kThreads) {
    const int head = vec / head_vecs, d = (vec - head * head_vecs) * kN;
    const int n = min(static_cast<int>(a.head_size) - d, kN);
    const T* key = static_cast<const T*>(a.key) + head * a.head_size + d;
    const T* value = static_cast<const T*>(a.value) + head * a.head_size + d;
    gpu::Vec<T, kN> k[kTokens], v[kTokens];
    int64_t slot[kTokens];
#pragma unroll
    for (int u = 0; u < kTokens; ++u) {
      const int64_t t = (static_cast<int64_t>(blockIdx.x) * kTokens + u) * rows_at_once + sub;
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
      gpu::split_slot(slot[u], a.block_size, block, off);
      C* key_at = static_cast<C*>(a.key_cache) + block * a.key_block_stride +
                  off * a.key_page_stride + head * a.key_head_stride + d;
      C* value_at = static_cast<C*>(a.value_cache) + block * a.value_block_stride +
                    off * a.value_page_stride + head * a.value_head_stride + d;
      gpu::store<kAligned>(key_at, convert<T, kFormat>(k[u], k_divisor), n);
      gpu::store<kAligned>(value_at, convert<T, kFormat>(v[u], v_divisor), n);
    }
  }
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
      const int head_vecs = static_cast<int>(gpu::ceil_div(a.head_size, kN));
      const int row_vecs = head_vecs * static_cast<int>(a.heads);
      const int rows = row_vecs <= kThreads ? kThreads / row_vecs : 1;
      const bool all = a.head_size % kN == 0 &&
                       gpu::aligned(16, a.key, a.value, a.key_stride * kIn, a.value_stride * kIn) &&
                       gpu::aligned(kOut * kN, a.key_cache, a.value_cache,
                                    a.key_block_stride * kOut, a.key_page_stride * kOut,
                                    a.key_head_stride * kOut, a.value_block_stride * kOut,
                                    a.value_page_stride * kOut, a.value_head_stride * kOut);
      gpu::with_bool(all, [&](auto is_aligned) {
        constexpr bool kAligned = decltype(is_aligned)::value;
        auto go = [&](auto kernel, int tokens) {
          const auto blocks = static_cast<unsigned>(gpu::ceil_div(a.tokens, rows * tokens));
          kernel<<<blocks, kThreads, 0, gpu::stream_of(stream)>>>(a, head_vecs, row_vecs, rows);
        };
        // Few tokens: spread them over more blocks.
        if (a.tokens / rows < 1024) {
          go(write_flash<T, kFormat, kAligned, 1>, 1);
        } else {
          // Conversions take registers: fewer tokens keep as many blocks on a multiprocessor.
          constexpr int kTokens = kFormat == KvFormat::kCopy ? 4 : 2;
          go(write_flash<T, kFormat, kAligned, kTokens>, kTokens);
        }
      });
    });
  });
  GPU_CHECK_LAUNCH("reshape_and_cache_flash");
}

}  // namespace kvcache
