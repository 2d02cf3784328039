// The fused rotation and MLA cache write on the GPU: a block owns a part of a token.
#include "elementwise/rotary.cuh"
#include "kvcache/cache.h"
#include "prim/gpu_fp8.h"

namespace kvcache {
namespace {

using elementwise::RotaryStep;

template <class T, KvFormat kFormat, bool kNeox, bool kAligned, int kUnroll, int kThreads,
          int kMinBlocks>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    rope_and_write(ConcatMlaRopeArgs a, gpu::FastDivisor steps) {
  gpu::begin_overlapped();
  using Write = gpu::Quantizer<kFormat, T>;
  using C = typename Write::Item;
  constexpr int kN = gpu::kVec<T>, kP = elementwise::kPairs<T, kNeox>;
  const ConcatMlaArgs& m = a.mla;
  const int64_t t = blockIdx.x, slot = m.slots[t], position = a.positions[t];
  const int half = static_cast<int>(m.rope / 2), heads = static_cast<int>(a.heads);
  T* query = static_cast<T*>(a.q_pe) + t * a.q_token_stride;
  T* key = static_cast<T*>(const_cast<void*>(m.k_pe)) + t * m.k_pe_stride;
  const T* latent = static_cast<const T*>(m.kv_c) + t * m.kv_c_stride;
  const int latent_steps = static_cast<int>((m.latent + kN - 1) / kN);
  // Heads of the query, then the key, then the latent, in steps: the loads of all of them come
  // before the slot and the position are known.
  const int rotated = (heads + 1) * steps.divisor, total = rotated + latent_steps;
  const int base = blockIdx.y * (kUnroll * kThreads) + threadIdx.x;
  RotaryStep<T, kNeox> step[kUnroll];
  int first[kUnroll];
  T* at[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int i = base + u * kThreads;
    if (i >= total) break;
    if (i < rotated) {
      const int head = steps.quotient(i);
      first[u] = (i - head * steps.divisor) * kP;
      at[u] = head < heads ? query + head * a.q_head_stride : key;
      step[u].template load<kAligned>(at[u], first[u], half, min(half - first[u], kP));
    } else {
      first[u] = (i - rotated) * kN;
      gpu::load_once<kAligned>(step[u].x, latent + first[u],
                               min(static_cast<int>(m.latent) - first[u], kN));
    }
  }
  if (slot < 0 || slot >= m.num_blocks * m.block_size) return;
  if (position < 0 || position >= a.max_position) return;
  int64_t block, off;
  gpu::split_slot(slot, m.block_size, block, off);
  C* entry = static_cast<C*>(m.cache) + block * m.block_stride + off * m.entry_stride;
  const T* row = static_cast<const T*>(a.cos_sin) + position * a.cos_sin_stride;
  const Write write = Write::for_warps(m.scale == nullptr ? 1.0f : *m.scale);
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int i = base + u * kThreads;
    if (i >= total) break;
    if (i >= rotated) {
      gpu::store_once<kAligned>(entry + first[u], write(step[u].x),
                                min(static_cast<int>(m.latent) - first[u], kN));
      continue;
    }
    const int n = min(half - first[u], kP);
    elementwise::Angles<T, kP> angles;
    angles.template load<kAligned>(row, first[u], half, n);
    step[u].rotate(angles, 1.0f);
    step[u].template store<kAligned>(at[u], first[u], half, n);
    if (at[u] != key) continue;
    C* rope = entry + m.latent;
    if constexpr (kNeox) {
      gpu::store<kAligned>(rope + first[u], write(step[u].x), n);
      gpu::store<kAligned>(rope + half + first[u], write(step[u].y), n);
    } else {
      gpu::store<kAligned>(rope + 2 * first[u], write(step[u].x), 2 * n);
    }
  }
}

}  // namespace

void concat_and_cache_mla_rope_fused(const ConcatMlaRopeArgs& a, Stream stream) {
  const ConcatMlaArgs& m = a.mla;
  gpu::with_float(m.dtype, [&](auto type) {
    gpu::with_format(m.format, [&](auto format) {
      gpu::with_bool(a.neox, [&](auto neox) {
        using T = decltype(type);
        constexpr KvFormat kFormat = decltype(format)::value;
        constexpr bool kNeox = decltype(neox)::value;
        constexpr int64_t kIn = sizeof(T), kOut = sizeof(gpu::CacheItem<kFormat, T>);
        constexpr int kN = gpu::kVec<T>, kP = elementwise::kPairs<T, kNeox>;
        const int64_t half = m.rope / 2;
        const int64_t steps = gpu::ceil_div(half, kP);
        const bool all = half % kP == 0 && m.latent % kN == 0 &&
                         gpu::aligned(16, a.q_pe, m.k_pe, m.kv_c, a.cos_sin, a.q_token_stride * kIn,
                                      a.q_head_stride * kIn, m.k_pe_stride * kIn,
                                      m.kv_c_stride * kIn, a.cos_sin_stride * kIn, half * kIn) &&
                         gpu::aligned(kOut * kN, m.cache, m.block_stride * kOut,
                                      m.entry_stride * kOut, m.latent * kOut, half * kOut);
        gpu::with_bool(all, [&](auto is_aligned) {
          constexpr int kUnroll = 3, kThreads = 224;
          const int64_t total = (a.heads + 1) * steps + gpu::ceil_div(m.latent, kN);
          const dim3 grid(static_cast<unsigned>(m.tokens),
                          static_cast<unsigned>(gpu::ceil_div(total, kUnroll * kThreads)));
          gpu::launch_overlapped(
              "concat_and_cache_mla_rope_fused",
              rope_and_write<T, kFormat, kNeox, decltype(is_aligned)::value, kUnroll, kThreads, 4>,
              grid, kThreads, gpu::stream_of(stream), a, gpu::FastDivisor(steps));
        });
      });
    });
  });
}

}  // namespace kvcache
