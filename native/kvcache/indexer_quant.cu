// The indexer's keys into their cache on the GPU: 8 values per thread, group / 8 neighbouring lanes
// a group.
#include "kvcache/cache.h"
#include "prim/gpu_fp8.h"
#include "prim/gpu_shuffle.h"

namespace kvcache {
namespace {

constexpr int kThreads = 256, kN = 8;

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads) quantize_keys(IndexerQuantArgs a) {
  gpu::begin_overlapped();
  // D and the group are multiples of 32: a group never crosses tokens nor its lanes.
  const int64_t step = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  int64_t token, in_row;
  gpu::split_slot(step, a.head_size / kN, token, in_row);
  const int d = static_cast<int>(in_row) * kN;
  const bool exists = token < a.tokens;
  const int64_t slot = exists ? a.slots[token] : -1;
  gpu::Kept<gpu::Vec<T, kN>> v{};
  if (exists) gpu::load<kAligned>(v, static_cast<const T*>(a.k) + token * a.head_size + d);
  const gpu::Vec<T, kN> values = v.get();
  float amax = 0.0f;
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    amax = fmaxf(amax, fabsf(gpu::to_float(values.at[j])));  // passes over a NaN
  }
  for (int offset = static_cast<int>(a.group) / kN / 2; offset > 0; offset /= 2) {
    amax = fmaxf(amax, gpu::shuffle_xor(amax, offset));
  }
  if (slot < 0 || slot >= a.num_blocks * a.block_size) return;
  float scale = fmaxf(amax, 1e-4f) / 448.0f;
  if (a.scale_format != ScaleFormat::kFloat32) scale = gpu::power_of_two_at_least(scale);
  const gpu::Divisor divisor(scale);
  const auto codes = a.scale_format == ScaleFormat::kFloat32
                         ? gpu::quantized<KvFormat::kE4M3>(v, divisor)
                         : gpu::quantized_by_product<KvFormat::kE4M3>(v, divisor);
  int64_t in_cache, off;
  gpu::split_slot(slot, a.block_size, in_cache, off);
  uint8_t* block = a.cache + in_cache * a.block_stride;
  const int64_t at = off * a.head_size + d;
  gpu::store<kAligned>(block + at, codes);
  if (d % a.group != 0) return;
  uint32_t stored = __float_as_uint(scale);
  if (a.scale_format == ScaleFormat::kExponentByte) stored = (stored >> 23) * 0x01010101u;
  uint8_t* to = block + a.block_size * a.head_size + at / a.group * 4;
  if constexpr (kAligned) {
    *reinterpret_cast<uint32_t*>(to) = stored;
  } else {
    for (int j = 0; j < 4; ++j) to[j] = static_cast<uint8_t>(stored >> (8 * j));
  }
}

}  // namespace

void indexer_k_quant_and_cache(const IndexerQuantArgs& a, Stream stream) {
  const auto blocks = static_cast<unsigned>(gpu::ceil_div(a.tokens * (a.head_size / kN), kThreads));
  const bool all = gpu::aligned(16, a.k) && gpu::aligned(8, a.cache, a.block_stride);
  const gpu::Stream s = gpu::stream_of(stream);
  gpu::with_bool(all, [&](auto is_aligned) {
    constexpr bool kAligned = decltype(is_aligned)::value;
    gpu::launch_overlapped("indexer_k_quant_and_cache",
                           a.dtype == DType::kFloat16 ? quantize_keys<gpu::Half, kAligned>
                                                      : quantize_keys<gpu::BFloat16, kAligned>,
                           dim3(blocks), kThreads, s, a);
  });
}

}  // namespace kvcache
