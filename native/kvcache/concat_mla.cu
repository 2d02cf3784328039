// MLA cache entries on the GPU: a thread keeps its place in the entry and takes a few tokens.
#include "kvcache/cache.h"
#include "kvcache/runs.cuh"

namespace kvcache {
namespace {

constexpr int kTokens = 2;

// Vectors [0, latent_vecs) of an entry come from kv_c, the others from k_pe.
template <class T, KvFormat kFormat, bool kAligned>
__global__ void write_mla(ConcatMlaArgs a, int latent_vecs, int row_vecs, int rows_at_once) {
  using C = CacheItemT<T, kFormat>;
  constexpr int kN = gpu::kVec<T>;
  const int sub = threadIdx.x / row_vecs;
  if (sub >= rows_at_once) return;
  const int64_t limit = a.num_blocks * a.block_size;
  for (int vec = threadIdx.x % row_vecs; vec < row_vecs; vec += blockDim.x) {
    const bool rope = vec >= latent_vecs;
    const int col = (rope ? vec - latent_vecs : vec) * kN;
    const int n = min(static_cast<int>(rope ? a.rope : a.latent) - col, kN);
    const T* from = static_cast<const T*>(rope ? a.k_pe : a.kv_c) + col;
    const int64_t stride = rope ? a.k_pe_stride : a.kv_c_stride;
    const int64_t at = rope ? a.latent + col : col;
    gpu::Vec<T, kN> v[kTokens];
    int64_t slot[kTokens];
#pragma unroll
    for (int u = 0; u < kTokens; ++u) {
      const int64_t t = (static_cast<int64_t>(blockIdx.x) * kTokens + u) * rows_at_once + sub;
      slot[u] = t < a.tokens ? a.slots[t] : -1;
      if (slot[u] >= limit) slot[u] = -1;
      // The row exists whatever its slot: load it while the slot is on its way.
      if (t < a.tokens) gpu::load<kAligned>(v[u], from + t * stride, n);
    }
    const gpu::Divisor divisor(a.scale == nullptr ? 1.0f : *a.scale);
#pragma unroll
    for (int u = 0; u < kTokens; ++u) {
      if (slot[u] < 0) continue;
      int64_t block, off;
      gpu::split_slot(slot[u], a.block_size, block, off);
      C* entry = static_cast<C*>(a.cache) + block * a.block_stride + off * a.entry_stride;
      gpu::store<kAligned>(entry + at, convert<T, kFormat>(v[u], divisor), n);
    }
  }
}

// The 656-byte entry: a warp a token, 8 lanes a tile of 128 values, 16 values a lane.
template <class T, bool kAligned>
__global__ void __launch_bounds__(256) write_ds_mla(ConcatMlaArgs a, bool aligned_in) {
  const int lane = threadIdx.x % 32;
  const int64_t t = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (t >= a.tokens) return;
  const int64_t slot = a.slots[t];
  const T* kv_c = static_cast<const T*>(a.kv_c) + t * a.kv_c_stride + lane * 16;
  const T* k_pe = static_cast<const T*>(a.k_pe) + t * a.k_pe_stride + lane * 8;
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
  float f[16], amax = 0.0f;
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    f[j] = gpu::to_float(x[j / 8].at[j % 8]);
    amax = fmaxf(amax, fabsf(f[j]));  // passes over a NaN
  }
#pragma unroll
  for (int offset = 4; offset > 0; offset /= 2) {
    amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, offset));
  }
  const float scale = gpu::power_of_two_at_least(fmaxf(amax / 448.0f, 1e-4f));
  gpu::Vec<uint8_t, 16> codes;
  gpu::quantize<KvFormat::kE4M3>(codes, f, gpu::Divisor(scale));
  int64_t block, off;
  gpu::split_slot(slot, a.block_size, block, off);
  uint8_t* entry = static_cast<uint8_t*>(a.cache) + block * a.block_stride + off * a.entry_stride;
  gpu::store<kAligned>(entry + lane * 16, codes);
  if (lane % 8 == 0) *reinterpret_cast<float*>(entry + kDsMlaScales + lane / 2) = scale;
  if (lane < 8) gpu::store<kAligned>(reinterpret_cast<T*>(entry + kDsMlaRope) + lane * 8, rope);
}

template <KvFormat kFormat>
__global__ void write_grouped(ConcatMlaGroupedArgs a) {
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
  gpu::with_float(a.dtype, [&](auto type) {
    gpu::with_format(a.format, [&](auto format) {
      using T = decltype(type);
      constexpr KvFormat kFormat = decltype(format)::value;
      constexpr int64_t kIn = sizeof(T), kOut = sizeof(CacheItemT<T, kFormat>);
      constexpr int kN = gpu::kVec<T>;
      const int latent_vecs = static_cast<int>(gpu::ceil_div(a.latent, kN));
      const int row_vecs = latent_vecs + static_cast<int>(gpu::ceil_div(a.rope, kN));
      const int rows = row_vecs < 256 ? 256 / row_vecs : 1;
      const int wanted = static_cast<int>(gpu::ceil_div(rows * row_vecs, 32) * 32);
      const int threads = wanted < 512 ? wanted : 512;
      const bool all =
          gpu::aligned(kN, a.latent, a.rope) &&
          gpu::aligned(16, a.kv_c, a.k_pe, a.kv_c_stride * kIn, a.k_pe_stride * kIn) &&
          gpu::aligned(kOut * kN, a.cache, a.block_stride * kOut, a.entry_stride * kOut);
      const auto blocks = static_cast<unsigned>(gpu::ceil_div(a.tokens, rows * kTokens));
      gpu::with_bool(all, [&](auto is_aligned) {
        write_mla<T, kFormat, decltype(is_aligned)::value>
            <<<blocks, threads, 0, gpu::stream_of(stream)>>>(a, latent_vecs, row_vecs, rows);
      });
    });
  });
  GPU_CHECK_LAUNCH("concat_and_cache_mla");
}

void concat_and_cache_ds_mla(const ConcatMlaArgs& a, Stream stream) {
  const auto blocks = static_cast<unsigned>(gpu::ceil_div(a.tokens, 8));
  const bool in = gpu::aligned(16, a.kv_c, a.k_pe, a.kv_c_stride * 2, a.k_pe_stride * 2);
  gpu::with_bool(gpu::aligned(16, a.cache, a.block_stride, a.entry_stride), [&](auto is_aligned) {
    constexpr bool kAligned = decltype(is_aligned)::value;
    const gpu::Stream s = gpu::stream_of(stream);
    if (a.dtype == DType::kFloat16) {
      write_ds_mla<gpu::Half, kAligned><<<blocks, 256, 0, s>>>(a, in);
    } else {
      write_ds_mla<gpu::BFloat16, kAligned><<<blocks, 256, 0, s>>>(a, in);
    }
  });
  GPU_CHECK_LAUNCH("concat_and_cache_mla (fp8_ds_mla)");
}

void concat_and_cache_mla_grouped(const ConcatMlaGroupedArgs& a, Stream stream) {
  gpu::with_format(a.format, [&](auto format) {
    write_grouped<decltype(format)::value>
        <<<static_cast<unsigned>(a.layers * a.tokens), 128, 0, gpu::stream_of(stream)>>>(a);
  });
  GPU_CHECK_LAUNCH("concat_and_cache_mla_grouped");
}

}  // namespace kvcache
