// Decode attention on the GPU: which kernel, how many splits, and the merge of the splits. What the
// tensor cores do not take (fp32, unaligned caches) goes to a plain kernel here.
#include <algorithm>

#include "attention/paged_attention.cuh"

namespace attention {
namespace {

bool on_tensor_cores(const PagedAttentionArgs& a) {
  if (a.dtype == DType::kFloat32) return false;
  const int64_t item = a.format == KvFormat::kCopy ? 2 : 1;
  if (a.packed && (a.block_size % 8 != 0 || a.head_size * item % 16 != 0)) return false;
  return gpu::aligned(16, a.key_cache, a.value_cache, a.k_block_stride * item,
                      a.k_head_stride * item, a.v_block_stride * item, a.v_head_stride * item,
                      a.k_page_stride * item, a.v_page_stride * item);
}

int multiprocessors() {
  static int known[64] = {};
  int device = 0;
  GPU_CHECK(GPU_NAME(GetDevice)(&device));
  int& count = known[device % 64];
  if (count == 0) {
    GPU_CHECK(GPU_NAME(DeviceGetAttribute)(&count, GPU_NAME(DevAttrMultiProcessorCount), device));
  }
  return count;
}

// Splits of a sequence, from shapes alone (lengths are on the device). The time is about waves of
// blocks times the tokens of a block, with what a block and the merge cost besides, in tokens.
int splits_for(const PagedAttentionArgs& a) {
  if (a.tmp_out != nullptr) {
    return static_cast<int>(std::max<int64_t>(1, gpu::ceil_div(a.longest, int64_t{kPartition})));
  }
  const int64_t group = a.heads / a.kv_heads;
  const int64_t work = a.sequences * a.kv_heads * gpu::ceil_div(group, group > 8 ? 16 : 8);
  const int64_t at_once = multiprocessors() * (a.head_size > 128             ? 1
                                               : a.format == KvFormat::kCopy ? 2
                                                                             : 3);
  const int64_t most = std::clamp<int64_t>(gpu::ceil_div(a.longest, 64), 1, 256);
  constexpr int64_t kBlockCost = 64, kMergeCost = 64;
  int64_t best = 1, least = INT64_MAX;
  for (int64_t n = 1; n <= most; ++n) {
    const int64_t tokens = gpu::ceil_div(gpu::ceil_div(a.longest, n), 64) * 64;
    const int64_t cost =
        gpu::ceil_div(work * n, at_once) * (tokens + kBlockCost) + (n > 1 ? kMergeCost + n : 0);
    if (cost < least) least = cost, best = n;
  }
  return static_cast<int>(best);
}

// One query head a block, any dtype, layout and alignment: a warp takes every fourth token.
template <class T>
__global__ void __launch_bounds__(kThreads)
    decode_any(const __grid_constant__ PagedAttentionArgs a, Splits splits) {
  constexpr int kMost = 8;  // elements a lane: head sizes up to 256
  __shared__ float shares[kWarps][32 * kMost], tops[kWarps], sums[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, split = blockIdx.x;
  const int64_t s = blockIdx.z, h = blockIdx.y, group = a.heads / a.kv_heads, kv_head = h / group;
  const int length = a.lens[s], reach = tokens_of(a, s), d_size = static_cast<int>(a.head_size);
  int first, last;
  split_of(a, reach, split, splits.count, first, last);
  if (first >= last) return write_nothing(a, splits, s, h, 1, split, reach);
  const float k_scale = a.k_scale == nullptr ? 1.0f : *a.k_scale;
  const float v_scale = a.v_scale == nullptr ? 1.0f : *a.v_scale;
  auto item = [&](const void* cache, int64_t at, float scale) {
    if (a.format == KvFormat::kCopy) return gpu::to_float(static_cast<const T*>(cache)[at]);
    const uint32_t code = static_cast<const uint8_t*>(cache)[at];
    const __half2 both = a.format == KvFormat::kE5M2 ? gpu::from_fp8x2<KvFormat::kE5M2>(code)
                                                     : gpu::from_fp8x2<KvFormat::kE4M3>(code);
    return gpu::to_float(gpu::from_float<T>(__low2float(both) * scale));
  };
  float q[kMost], o[kMost], top = -INFINITY, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    const int d = lane + 32 * i;
    o[i] = 0.0f;
    q[i] = d < d_size ? gpu::to_float(static_cast<const T*>(
                            a.query)[s * a.query_stride + h * a.query_head_stride + d])
                      : 0.0f;
  }
  for (int t = first + warp; t < last; t += kWarps) {
    const int64_t block = a.tables[s * a.table_stride + t / a.block_size], off = t % a.block_size;
    if (block < 0 || block >= a.num_blocks) continue;
    const int64_t k_at = block * a.k_block_stride + kv_head * a.k_head_stride;
    const int64_t v_at = block * a.v_block_stride + kv_head * a.v_head_stride;
    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const int64_t d = lane + 32 * i;
      if (d >= d_size) break;
      const int64_t at =
          a.packed ? (d / a.x * a.block_size + off) * a.x + d % a.x : off * a.k_page_stride + d;
      dot += q[i] * item(a.key_cache, k_at + at, k_scale);
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) dot += __shfl_xor_sync(~0u, dot, offset);
    float x = dot * a.scale;
    if (a.alibi != nullptr) x += a.alibi[h] * static_cast<float>(t - length + 1);
    x *= kLog2E;
    if (!attends(a.sparse, h, a.heads, group, t, length)) x = -FLT_MAX;
    const float now = fmaxf(top, x), rescale = exp2f(top - now), p = exp2f(x - now);
    top = now;
    sum = sum * rescale + p;
    const float weight = gpu::to_float(gpu::from_float<T>(p));
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const int64_t d = lane + 32 * i;
      if (d >= d_size) break;
      const int64_t at = a.packed ? d * a.block_size + off : off * a.v_page_stride + d;
      o[i] = o[i] * rescale + weight * item(a.value_cache, v_at + at, v_scale);
    }
  }
#pragma unroll
  for (int i = 0; i < kMost; ++i) shares[warp][lane + 32 * i] = o[i];
  if (lane == 0) tops[warp] = top, sums[warp] = sum;
  __syncthreads();
  for (int d = threadIdx.x; d < d_size; d += kThreads) {
    float most = -INFINITY, value = 0.0f, total = 0.0f;
    for (int j = 0; j < kWarps; ++j) most = fmaxf(most, tops[j]);
    for (int j = 0; j < kWarps; ++j) {
      const float weight = tops[j] == -INFINITY ? 0.0f : exp2f(tops[j] - most);
      value += shares[j][d] * weight;
      total += sums[j] * weight;
    }
    write_result(a, splits, s, h, split, d, value, most, total);
  }
}

// The splits of one query head: warps take every fourth split, lanes the elements.
template <class T>
__global__ void __launch_bounds__(kThreads)
    merge_splits(const __grid_constant__ PagedAttentionArgs a, Splits splits) {
  constexpr int kMost = 8;
  __shared__ float shares[kWarps][32 * kMost];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t s = blockIdx.y, h = blockIdx.x, pair = s * a.heads + h;
  const int d_size = static_cast<int>(a.head_size);
  const bool v2 = a.tmp_out != nullptr;
  const int count = v2 ? (tokens_of(a, s) + kPartition - 1) / kPartition : splits.count;
  const float* largest = v2 ? a.max_logits + pair * a.partitions : splits.largest + pair * count;
  const float* sums = v2 ? a.exp_sums + pair * a.partitions : splits.sum + pair * count;
  T* out = static_cast<T*>(a.out) + s * a.out_stride + h * a.out_head_stride;
  const T* tmp = static_cast<const T*>(a.tmp_out) + pair * a.partitions * d_size;
  const float base = v2 ? kLog2E : 1.0f;  // the maxima of v2 are natural
  if (v2 && count == 1) {
    for (int d = threadIdx.x; d < d_size; d += kThreads) out[d] = tmp[d];
    return;
  }
  float top = -INFINITY, total = 0.0f;
  for (int j = lane; j < count; j += 32) top = fmaxf(top, largest[j]);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    top = fmaxf(top, __shfl_xor_sync(~0u, top, offset));
  }
  auto weight_of = [&](int j) {
    return top == -INFINITY ? 0.0f : exp2f((largest[j] - top) * base);
  };
  for (int j = lane; j < count; j += 32) total += sums[j] * weight_of(j);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
  float o[kMost] = {};
  for (int j = warp; j < count; j += kWarps) {
    const float weight = weight_of(j) * (v2 ? sums[j] : 1.0f);
    if (weight == 0.0f) continue;  // an empty split has written no elements
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const int d = lane + 32 * i;
      if (d >= d_size) break;
      const float x = v2 ? gpu::to_float(tmp[static_cast<int64_t>(j) * d_size + d])
                         : splits.acc[(pair * count + j) * d_size + d];
      o[i] += x * weight;
    }
  }
#pragma unroll
  for (int i = 0; i < kMost; ++i) shares[warp][lane + 32 * i] = o[i];
  __syncthreads();
  const float inverse = total > 0.0f ? 1.0f / (total + a.epsilon) : 0.0f;
  for (int d = threadIdx.x; d < d_size; d += kThreads) {
    float value = 0.0f;
#pragma unroll
    for (int j = 0; j < kWarps; ++j) value += shares[j][d];
    out[d] = gpu::from_float<T>(value * inverse);
  }
  if (threadIdx.x == 0 && a.lse != nullptr) {
    a.lse[h * a.lse_head_stride + s * a.lse_sequence_stride] =
        total > 0.0f ? top * kLn2 + logf(total) : -INFINITY;
  }
}

}  // namespace

int64_t paged_attention_scratch(const PagedAttentionArgs& a) {
  const int splits = splits_for(a);
  if (splits == 1 || a.tmp_out != nullptr) return 0;
  return a.sequences * a.heads * splits * (a.head_size + 2) * int64_t{sizeof(float)};
}

void paged_attention(const PagedAttentionArgs& a, Stream stream) {
  const gpu::Stream s = gpu::stream_of(stream);
  Splits splits{splits_for(a), nullptr, nullptr, nullptr};
  if (splits.count > 1 && a.tmp_out == nullptr) {
    const int64_t n = a.sequences * a.heads * splits.count;
    splits.acc = static_cast<float*>(a.scratch);
    splits.largest = splits.acc + n * a.head_size;
    splits.sum = splits.largest + n;
  }
  if (on_tensor_cores(a)) {
    a.packed ? decode_packed(a, splits, s) : decode_flash(a, splits, s);
  } else {
    const dim3 grid(static_cast<unsigned>(splits.count), static_cast<unsigned>(a.heads),
                    static_cast<unsigned>(a.sequences));
    gpu::with_float(a.dtype, [&](auto type) {
      decode_any<decltype(type)><<<grid, kThreads, 0, s>>>(a, splits);
    });
  }
  GPU_CHECK_LAUNCH("paged_attention");
  if (splits.count == 1 && a.tmp_out == nullptr) return;
  const dim3 grid(static_cast<unsigned>(a.heads), static_cast<unsigned>(a.sequences));
  gpu::with_float(a.dtype, [&](auto type) {
    merge_splits<decltype(type)><<<grid, kThreads, 0, s>>>(a, splits);
  });
  GPU_CHECK_LAUNCH("paged_attention (merge)");
}

}  // namespace attention
