// MLA cache entries on the GPU: the vectors of all entries in one row of threads.
#include "kvcache/cache.h"
#include "kvcache/runs.cuh"

namespace kvcache {
namespace {

// Vectors [0, latent_vecs) of an entry come from kv_c, the others from k_pe.
template <class T, KvFormat kFormat, bool kAligned, int kUnroll, int kThreads>
__global__ void __launch_bounds__(kThreads)
    write_mla(ConcatMlaArgs a, int latent_vecs, gpu::FastDivisor row_vecs,
              gpu::FastDivisor block_size) {
  gpu::launch_dependents();
  using C = CacheItemT<T, kFormat>;
  constexpr int kN = gpu::kVec<T>;
  const int64_t limit = a.num_blocks * a.block_size;
  const uint32_t total = static_cast<uint32_t>(a.tokens) * row_vecs.divisor;
  const uint32_t base = blockIdx.x * (kUnroll * kThreads) + threadIdx.x;
  gpu::Kept<gpu::Vec<T, kN>> v[kUnroll];
  const T* from[kUnroll];
  int64_t t[kUnroll], slot[kUnroll];
  int at[kUnroll], n[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const uint32_t i = base + u * kThreads;
    if (i >= total) break;
    t[u] = row_vecs.quotient(i);
    const int vec = static_cast<int>(i - t[u] * row_vecs.divisor);
    const bool rope = vec >= latent_vecs;
    const int col = (rope ? vec - latent_vecs : vec) * kN;
    n[u] = min(static_cast<int>(rope ? a.rope : a.latent) - col, kN);
    at[u] = rope ? static_cast<int>(a.latent) + col : col;
    from[u] = (rope ? static_cast<const T*>(a.k_pe) + t[u] * a.k_pe_stride
                    : static_cast<const T*>(a.kv_c) + t[u] * a.kv_c_stride) +
              col;
    gpu::prefetch_early(from[u]);
    gpu::prefetch_early(a.slots + t[u]);
  }
  gpu::dependency_wait();
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (base + u * kThreads >= total) break;
    slot[u] = a.slots[t[u]];
    // The row exists whatever its slot: load it while the slot is on its way.
    gpu::load<kAligned>(v[u], from[u], n[u]);
  }
  const gpu::Divisor divisor(a.scale == nullptr ? 1.0f : *a.scale);
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (base + u * kThreads >= total) break;
    if (slot[u] < 0 || slot[u] >= limit) continue;
    int64_t block, off;
    gpu::split_slot(slot[u], a.block_size, block_size, block, off);
    C* entry = static_cast<C*>(a.cache) + block * a.block_stride + off * a.entry_stride;
    gpu::store<kAligned>(entry + at[u], convert<T, kFormat>(v[u].get(), divisor), n[u]);
  }
}

// The 656-byte entry: a warp a token, 8 lanes a tile of 128 values, 16 values a lane.
template <class T, bool kAligned>
__global__ void __launch_bounds__(128) write_ds_mla(ConcatMlaArgs a, bool aligned_in) {
  gpu::launch_dependents();
  const int lane = threadIdx.x % 32;
  const int64_t t = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (t >= a.tokens) return;
  const T* kv_c = static_cast<const T*>(a.kv_c) + t * a.kv_c_stride + lane * 16;
  const T* k_pe = static_cast<const T*>(a.k_pe) + t * a.k_pe_stride + lane * 8;
  gpu::prefetch_early(a.slots + t);
  gpu::prefetch_early(kv_c);
  if (lane < 8) gpu::prefetch_early(k_pe);
  gpu::dependency_wait();
  const int64_t slot = a.slots[t];
  gpu::Vec<T, 8> x[2], rope;
  auto fetch = [&](auto in) {
    constexpr bool kIn = decltype(in)::value;
    gpu::load<kIn>(x[0], kv_c);
    gpu::load<kIn>(x[1], kv_c + 8);
    if (lane < 8 && a.rope != 0) {
      gpu::load<kIn>(rope, k_pe);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) rope.at[j] = gpu::from_float<T>(0.0f);
    }
  };
  if (aligned_in) {
    fetch(gpu::BoolTag<true>{});
  } else {
    fetch(gpu::BoolTag<false>{});
  }
  if (slot < 0 || slot >= a.num_blocks * a.block_size) return;
  float amax = 0.0f;
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    amax = fmaxf(amax, fabsf(gpu::to_float(x[j / 8].at[j % 8])));  // passes over a NaN
  }
#pragma unroll
  for (int offset = 4; offset > 0; offset /= 2) {
    amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, offset));
  }
  const float scale = gpu::power_of_two_at_least(fmaxf(amax / 448.0f, 1e-4f));
  const gpu::Divisor divisor(scale);
  gpu::Vec<uint8_t, 8> half[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) gpu::quantize<KvFormat::kE4M3, true>(half[i], x[i], divisor);
  gpu::Vec<uint8_t, 16> codes;
  memcpy(&codes, half, 16);
  int64_t block, off;
  gpu::split_slot(slot, a.block_size, block, off);
  uint8_t* entry = static_cast<uint8_t*>(a.cache) + block * a.block_stride + off * a.entry_stride;
  gpu::store<kAligned>(entry + lane * 16, codes);
  if (lane % 8 == 0) *reinterpret_cast<float*>(entry + kDsMlaScales + lane / 2) = scale;
  if (lane < 8) gpu::store<kAligned>(reinterpret_cast<T*>(entry + kDsMlaRope) + lane * 8, rope);
}

template <KvFormat kFormat>
__global__ void write_grouped(ConcatMlaGroupedArgs a) {
  gpu::begin_overlapped();
  using T = gpu::BFloat16;
  using C = CacheItemT<T, kFormat>;
  const int64_t row = blockIdx.x, slot = a.slots[row], layer = row / a.tokens;
  if (slot < 0) return;
  C* entry = reinterpret_cast<C*>(a.cache_ptrs[layer]) + slot / a.block_size * a.block_stride +
             slot % a.block_size * a.entry_stride;
  const gpu::Divisor divisor(a.scales == nullptr ? 1.0f : a.scales[layer]);
  for (int64_t i = threadIdx.x; i < a.latent + a.rope; i += blockDim.x) {
    gpu::Vec<T, 4> v{};
    v.at[0] = i < a.latent ? static_cast<const T*>(a.kv_c)[row * a.latent + i]
                           : static_cast<const T*>(a.k_pe)[row * a.rope + i - a.latent];
    entry[i] = convert<T, kFormat>(v, divisor).at[0];
  }
}

}  // namespace

void concat_and_cache_mla(const ConcatMlaArgs& a, Stream stream) {
  if (a.latent + a.rope == 0) return;
  // The kernel counts vectors, a few elements each, in 31 bits.
  const int64_t most = ((int64_t{1} << 31) - 1) / (a.latent + a.rope);
  if (a.tokens > most) {
    ConcatMlaArgs part = a;
    for (int64_t first = 0; first < a.tokens; first += most) {
      part.tokens = a.tokens - first < most ? a.tokens - first : most;
      part.kv_c = static_cast<const char*>(a.kv_c) + first * a.kv_c_stride * size_of(a.dtype);
      part.k_pe = static_cast<const char*>(a.k_pe) + first * a.k_pe_stride * size_of(a.dtype);
      part.slots = a.slots + first;
      concat_and_cache_mla(part, stream);
    }
    return;
  }
  gpu::with_float(a.dtype, [&](auto type) {
    gpu::with_format(a.format, [&](auto format) {
      using T = decltype(type);
      constexpr KvFormat kFormat = decltype(format)::value;
      constexpr int64_t kIn = sizeof(T), kOut = sizeof(CacheItemT<T, kFormat>);
      constexpr int kN = gpu::kVec<T>;
      const int latent_vecs = static_cast<int>(gpu::ceil_div(a.latent, kN));
      const int row_vecs = latent_vecs + static_cast<int>(gpu::ceil_div(a.rope, kN));
      const bool all =
          gpu::aligned(kN, a.latent, a.rope) &&
          gpu::aligned(16, a.kv_c, a.k_pe, a.kv_c_stride * kIn, a.k_pe_stride * kIn) &&
          gpu::aligned(kOut * kN, a.cache, a.block_stride * kOut, a.entry_stride * kOut);
      gpu::with_bool(all, [&](auto is_aligned) {
        constexpr bool kAligned = decltype(is_aligned)::value;
        auto go = [&](auto kernel, int unroll, int threads) {
          const dim3 grid(
              static_cast<unsigned>(gpu::ceil_div(a.tokens * row_vecs, unroll * threads)));
          gpu::launch_overlapped("concat_and_cache_mla", kernel, grid, threads,
                                 gpu::stream_of(stream), a, latent_vecs, gpu::FastDivisor(row_vecs),
                                 gpu::FastDivisor(a.block_size));
        };
        // Few tokens: spread them over more blocks.
        if (a.tokens * row_vecs < 1 << 17) {
          go(write_mla<T, kFormat, kAligned, 1, 128>, 1, 128);
        } else {
          constexpr bool kCodes = kFormat != KvFormat::kCopy;
          constexpr int kUnroll = kCodes ? 2 : 3, kThreads = kCodes ? 256 : 128;
          go(write_mla<T, kFormat, kAligned, kUnroll, kThreads>, kUnroll, kThreads);
        }
      });
    });
  });
}

void concat_and_cache_ds_mla(const ConcatMlaArgs& a, Stream stream) {
  const auto blocks = static_cast<unsigned>(gpu::ceil_div(a.tokens, 4));
  const bool in = gpu::aligned(16, a.kv_c, a.k_pe, a.kv_c_stride * 2, a.k_pe_stride * 2);
  gpu::with_bool(gpu::aligned(16, a.cache, a.block_stride, a.entry_stride), [&](auto is_aligned) {
    constexpr bool kAligned = decltype(is_aligned)::value;
    const gpu::Stream s = gpu::stream_of(stream);
    gpu::launch_overlapped("concat_and_cache_mla (fp8_ds_mla)",
                           a.dtype == DType::kFloat16 ? write_ds_mla<gpu::Half, kAligned>
                                                      : write_ds_mla<gpu::BFloat16, kAligned>,
                           dim3(blocks), 128, s, a, in);
  });
}

void concat_and_cache_mla_grouped(const ConcatMlaGroupedArgs& a, Stream stream) {
  gpu::with_format(a.format, [&](auto format) {
    gpu::launch_overlapped("concat_and_cache_mla_grouped", write_grouped<decltype(format)::value>,
                           dim3(static_cast<unsigned>(a.layers * a.tokens)), 128,
                           gpu::stream_of(stream), a);
  });
}

}  // namespace kvcache
