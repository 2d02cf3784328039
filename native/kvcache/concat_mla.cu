// MLA cache entries on the GPU: the vectors of all entries in one row of threads.
#include "kvcache/cache.h"
#include "prim/gpu_fp8.h"
#include "prim/gpu_shuffle.h"

namespace kvcache {
namespace {

// Strides in bytes, uint32_t where all of them and the slots fit: an address then is a few products
// of 32 bits.
template <class Stride>
struct Entries {
  const char *kv_c, *k_pe;
  char* cache;
  const int64_t* slots;
  const float* scale;  // null: 1
  Stride kv_c_stride, k_pe_stride, block_stride, entry_stride, slot_count;
  int latent, rope, latent_vecs;
  uint32_t vecs;  // of all rows
  gpu::FastDivisor row_vecs, block_size;
};

// Vectors [0, latent_vecs) of an entry come from kv_c, the others from k_pe.
template <class T, KvFormat kFormat, class Stride, bool kAligned, int kUnroll, int kThreads>
__global__ void __launch_bounds__(kThreads) write_mla(const __grid_constant__ Entries<Stride> a) {
  gpu::launch_dependents();
  using Write = gpu::Quantizer<kFormat, T>;
  using C = typename Write::Item;
  constexpr int kN = gpu::kVec<T>;
  const uint32_t base = blockIdx.x * (kUnroll * kThreads) + threadIdx.x;
  gpu::Kept<gpu::Vec<T, kN>> v[kUnroll];
  const T* from[kUnroll];
  uint32_t t[kUnroll];
  int64_t slot[kUnroll];
  int at[kUnroll], n[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const uint32_t i = min(base + u * kThreads, a.vecs - 1);
    t[u] = a.row_vecs.quotient(i);
    const int vec = static_cast<int>(i - t[u] * a.row_vecs.divisor);
    const bool rope = vec >= a.latent_vecs;
    const int col = (rope ? vec - a.latent_vecs : vec) * kN;
    n[u] = min((rope ? a.rope : a.latent) - col, kN);
    at[u] = rope ? a.latent + col : col;
    from[u] = reinterpret_cast<const T*>((rope ? a.k_pe : a.kv_c) +
                                         static_cast<uint64_t>(t[u]) *
                                             (rope ? a.k_pe_stride : a.kv_c_stride)) +
              col;
    gpu::prefetch_early(from[u]);
    gpu::prefetch_early(a.slots + t[u]);
  }
  gpu::dependency_wait();
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    slot[u] = -1;
    if (base + u * kThreads >= a.vecs) continue;
    slot[u] = a.slots[t[u]];
    // The row exists whatever its slot: load it while the slot is on its way.
    gpu::load<kAligned>(v[u], from[u], n[u]);
  }
  const bool scaled = kFormat != KvFormat::kCopy && a.scale != nullptr;
  const Write write = Write::for_warps(scaled ? *a.scale : 1.0f);
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (static_cast<uint64_t>(slot[u]) >= a.slot_count) continue;
    const auto place = gpu::place_of(static_cast<Stride>(slot[u]), a.block_size);
    C* entry = reinterpret_cast<C*>(a.cache + static_cast<uint64_t>(place.block) * a.block_stride +
                                    static_cast<uint64_t>(place.offset) * a.entry_stride);
    gpu::store<kAligned>(entry + at[u], write(v[u]), n[u]);
  }
}

// The 656-byte entry: a warp per token, 8 lanes a tile of 128 values, 16 values per lane.
template <class T, bool kAligned>
__global__ void __launch_bounds__(128)
    write_ds_mla(ConcatMlaArgs a, gpu::FastDivisor block_size, bool aligned_in) {
  gpu::launch_dependents();
  using V = gpu::Kept<gpu::Vec<T, 8>>;
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
  V x[2], rope{};
  auto fetch = [&](auto in) {
    constexpr bool kIn = decltype(in)::value;
    gpu::load<kIn>(x[0], kv_c);
    gpu::load<kIn>(x[1], kv_c + 8);
    if (lane < 8 && a.rope != 0) gpu::load<kIn>(rope, k_pe);
  };
  if (aligned_in) {
    fetch(gpu::BoolTag<true>{});
  } else {
    fetch(gpu::BoolTag<false>{});
  }
  if (slot < 0 || slot >= a.num_blocks * a.block_size) return;
  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const gpu::Vec<T, 8> values = x[i].get();
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      amax = fmaxf(amax, fabsf(gpu::to_float(values.at[j])));  // passes over a NaN
    }
  }
#pragma unroll
  for (int offset = 4; offset > 0; offset /= 2) {
    amax = fmaxf(amax, gpu::shuffle_xor(amax, offset));
  }
  const float scale = gpu::power_of_two_at_least(fmaxf(amax / 448.0f, 1e-4f));
  const gpu::Divisor divisor(scale);
  const uint2 low = gpu::quantized_by_product<KvFormat::kE4M3>(x[0], divisor).raw;
  const uint2 high = gpu::quantized_by_product<KvFormat::kE4M3>(x[1], divisor).raw;
  gpu::Kept<gpu::Vec<uint8_t, 16>> codes;
  codes.raw = {low.x, low.y, high.x, high.y};
  const auto place = gpu::place_of(static_cast<uint64_t>(slot), block_size);
  uint8_t* entry =
      static_cast<uint8_t*>(a.cache) + place.block * a.block_stride + place.offset * a.entry_stride;
  gpu::store<kAligned>(entry + lane * 16, codes);
  if (lane % 8 == 0) *reinterpret_cast<float*>(entry + kDsMlaScales + lane / 2) = scale;
  if (lane < 8) gpu::store<kAligned>(reinterpret_cast<T*>(entry + kDsMlaRope) + lane * 8, rope);
}

template <KvFormat kFormat>
__global__ void write_grouped(ConcatMlaGroupedArgs a) {
  gpu::begin_overlapped();
  using T = gpu::BFloat16;
  using Write = gpu::Quantizer<kFormat, T>;
  using C = typename Write::Item;
  const int64_t row = blockIdx.x, layer = row / a.tokens, t = row % a.tokens;
  const int64_t slot = a.slots[layer * a.slot_layer_stride + t * a.slot_stride];
  if (slot < 0) return;
  C* entry = reinterpret_cast<C*>(a.cache_ptrs[layer]) + slot / a.block_size * a.block_stride +
             slot % a.block_size * a.entry_stride;
  const T* kv_c = static_cast<const T*>(a.kv_c) + layer * a.kv_c_layer_stride + t * a.kv_c_stride;
  const T* k_pe = static_cast<const T*>(a.k_pe) + layer * a.k_pe_layer_stride + t * a.k_pe_stride;
  const Write write(a.scales == nullptr ? 1.0f : a.scales[layer]);
  for (int64_t i = threadIdx.x; i < a.latent + a.rope; i += blockDim.x) {
    gpu::Vec<T, 4> v{};
    v.at[0] = i < a.latent ? kv_c[i] : k_pe[i - a.latent];
    entry[i] = write(gpu::Kept(v)).get().at[0];
  }
}

// A launch: kUnroll vectors per thread.
template <class T, KvFormat kFormat, class Stride, bool kAligned, int kUnroll, int kThreads>
void launch(const ConcatMlaArgs& a, gpu::Stream stream) {
  constexpr int64_t kIn = sizeof(T), kOut = sizeof(gpu::CacheItem<kFormat, T>);
  const int latent_vecs = static_cast<int>(gpu::ceil_div(a.latent, gpu::kVec<T>));
  const int row_vecs = latent_vecs + static_cast<int>(gpu::ceil_div(a.rope, gpu::kVec<T>));
  const int64_t vecs = a.tokens * row_vecs;
  const Entries<Stride> args = {static_cast<const char*>(a.kv_c),
                                static_cast<const char*>(a.k_pe),
                                static_cast<char*>(a.cache),
                                a.slots,
                                a.scale,
                                static_cast<Stride>(a.kv_c_stride * kIn),
                                static_cast<Stride>(a.k_pe_stride * kIn),
                                static_cast<Stride>(a.block_stride * kOut),
                                static_cast<Stride>(a.entry_stride * kOut),
                                static_cast<Stride>(a.num_blocks * a.block_size),
                                static_cast<int>(a.latent),
                                static_cast<int>(a.rope),
                                latent_vecs,
                                static_cast<uint32_t>(vecs),
                                gpu::FastDivisor(row_vecs),
                                gpu::FastDivisor(a.block_size)};
  const dim3 grid(static_cast<unsigned>(gpu::ceil_div(vecs, kUnroll * kThreads)));
  gpu::launch_overlapped("concat_and_cache_mla",
                         write_mla<T, kFormat, Stride, kAligned, kUnroll, kThreads>, grid, kThreads,
                         stream, args);
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
      constexpr int64_t kIn = sizeof(T), kOut = sizeof(gpu::CacheItem<kFormat, T>);
      constexpr int kN = gpu::kVec<T>;
      const gpu::Stream s = gpu::stream_of(stream);
      const bool aligned =
          gpu::aligned(kN, a.latent, a.rope) &&
          gpu::aligned(16, a.kv_c, a.k_pe, a.kv_c_stride * kIn, a.k_pe_stride * kIn) &&
          gpu::aligned(kOut * kN, a.cache, a.block_stride * kOut, a.entry_stride * kOut);
      const bool narrow =
          gpu::narrow(a.kv_c_stride * kIn, a.k_pe_stride * kIn, a.block_stride * kOut,
                      a.entry_stride * kOut, a.num_blocks * a.block_size);
      if (!aligned || !narrow) {
        launch<T, kFormat, uint64_t, false, 1, 128>(a, s);
      } else if (a.tokens * (a.latent + a.rope) < 1 << 20) {
        launch<T, kFormat, uint32_t, true, 1, 128>(a, s);  // few tokens over more blocks
      } else {
        launch<T, kFormat, uint32_t, true, 2, 128>(a, s);
      }
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
                           dim3(blocks), 128, s, a, gpu::FastDivisor(a.block_size), in);
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
