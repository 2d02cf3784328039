// Decode attention on the GPU: which kernel, how many splits, and the merge of the splits. What the
// tensor cores do not take (fp32, unaligned caches) goes to a plain kernel here.
#include <algorithm>
#include <bit>

#include "attention/paged_attention.cuh"

namespace attention {
namespace {

// Whether a block's ring (see Decode) fits in this device's shared memory.
bool ring_fits(const PagedAttentionArgs& a) {
  const int64_t d = a.head_size > 128 ? 256 : a.head_size > 64 ? 128 : 64;
  const bool fp8 = a.format != KvFormat::kCopy;
  const int64_t row = d * (fp8 ? 1 : 2);
  const int64_t bytes = kWarps * ring_stages(fp8, d) * 2 * kTile * row + 16 * d * 2 + 1024;
  return bytes <= gpu::on_current_device<gpu::most_shared_bytes>();
}

bool on_tensor_cores(const PagedAttentionArgs& a) {
  if (a.dtype == DType::kFloat32 || !ring_fits(a)) return false;
  const int64_t item = a.format == KvFormat::kCopy ? 2 : 1;
  if (a.packed && (a.block_size % 8 != 0 || a.head_size * item % 16 != 0)) return false;
  // The kernel's 32-bit offsets, in 16 bytes (packed values: 8).
  const int64_t most = std::max(a.num_blocks * a.k_block_stride * item / 16,
                                a.num_blocks * a.v_block_stride * item / (a.packed ? 8 : 16));
  if (most >= (int64_t{1} << 32) - 1) return false;
  return gpu::aligned(16, a.key_cache, a.value_cache, a.k_block_stride * item,
                      a.k_head_stride * item, a.v_block_stride * item, a.v_head_stride * item,
                      a.k_page_stride * item, a.v_page_stride * item);
}

// KV heads of a block and splits of a sequence, from shapes alone (lengths are on the device).
struct Shares {
  int kv_heads, splits;
};

// The time is waves of blocks times the tokens of a block, with what a block and the merge cost
// besides, in tokens. A last wave that is not full takes less than a full one: a third of the waves
// counts by the fraction. (H200, measured on sequences of 1024 to 131072 tokens, 1 to 256 of them.)
// Two KV heads per block read longer pieces of a page, in fewer blocks: where nothing is split.
Shares shares_of(const PagedAttentionArgs& a) {
  if (a.tmp_out != nullptr) {
    return {1,
            static_cast<int>(std::max<int64_t>(1, gpu::ceil_div(a.longest, int64_t{kPartition})))};
  }
  const bool fp8 = a.format != KvFormat::kCopy;
  const int64_t group = a.heads / a.kv_heads;
  const int64_t processors = gpu::on_current_device<gpu::multiprocessors>();
  const int64_t work = a.sequences * a.kv_heads * gpu::ceil_div(group, group > 8 ? 16 : 8);
  // Blocks that are resident at once: one per multiprocessor above head size 128, two in 16 bits,
  // three for fp8 less one in 48, for which there is no room.
  const int64_t at_once = a.head_size > 128 ? processors
                          : fp8             ? processors * 3 - processors / 16
                                            : processors * 2;
  const int64_t most = std::clamp<int64_t>(gpu::ceil_div(a.longest, 64), 1, 256);  // kMostSplits
  const int64_t block_cost = fp8 ? 600 : 400;
  constexpr int64_t kMergeCost = 64;
  auto cost_of = [&](int64_t blocks, int64_t tokens) {
    const int64_t waves = gpu::ceil_div(blocks, at_once) * at_once;
    const int64_t filled = std::max(blocks, at_once);
    return (2 * waves + filled) * (tokens + block_cost) / (3 * at_once);
  };
  Shares best{1, 1};
  int64_t least = INT64_MAX;
  for (int64_t n = 1; n <= most; ++n) {
    const int64_t tokens = gpu::ceil_div(gpu::ceil_div(a.longest, n), 64) * 64;
    const int64_t cost = cost_of(work * n, tokens) + (n > 1 ? kMergeCost + n : 0);
    if (cost < least) least = cost, best.splits = static_cast<int>(n);
  }
  const bool can_pair = !fp8 && !a.packed && a.head_size > 64 && a.head_size <= 128 && group <= 8 &&
                        a.kv_heads % 2 == 0 && on_tensor_cores(a);
  if (can_pair && cost_of(work / 2, 2 * gpu::ceil_div(a.longest, 64) * 64) < least) best = {2, 1};
  return best;
}

// One query head per block, any dtype, layout and alignment: a warp takes every fourth token.
template <class T>
__global__ void __launch_bounds__(kThreads)
    decode_any(const __grid_constant__ PagedAttentionArgs a, Splits splits) {
  gpu::begin_overlapped();
  constexpr int kMost = 8;  // elements per lane: head sizes up to 256
  __shared__ float shares[kWarps][32 * kMost], tops[kWarps], sums[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, split = blockIdx.x;
  const int64_t s = blockIdx.z, h = blockIdx.y, group = a.heads / a.kv_heads, kv_head = h / group;
  const int length = a.lens[s], reach = tokens_of(a, s), d_size = static_cast<int>(a.head_size);
  int first, last;
  split_of(a, reach, split, splits.count, first, last);
  if (first >= last) return write_nothing(a, splits, s, h, 1, split);
  const float k_scale = a.k_scale == nullptr ? 1.0f : *a.k_scale;
  const float v_scale = a.v_scale == nullptr ? 1.0f : *a.v_scale;
  auto item = [&](const void* cache, int64_t at, float scale) {
    if (a.format == KvFormat::kCopy) return gpu::to_float(static_cast<const T*>(cache)[at]);
    const uint8_t code = static_cast<const uint8_t*>(cache)[at];
    const float x = a.format == KvFormat::kE5M2 ? gpu::from_fp8<KvFormat::kE5M2>(code)
                                                : gpu::from_fp8<KvFormat::kE4M3>(code);
    return gpu::to_float(gpu::from_float<T>(x * scale));
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
    for (int offset = 16; offset > 0; offset /= 2) dot += gpu::shuffle_xor(dot, offset);
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
    write_result<1>(a, splits, s, h, split, d, {value}, most, total);
  }
}

// The splits of one query head: a warp takes every eighth split, a lane four elements at a time.
constexpr int kMergeThreads = 256, kMergeWarps = kMergeThreads / 32, kMostSplits = 256;

template <class T>
__global__ void __launch_bounds__(kMergeThreads)
    merge_splits(const __grid_constant__ PagedAttentionArgs a, Splits splits) {
  gpu::begin_overlapped();
  constexpr int kMost = 256, kBatch = 4;
  __shared__ float shares[kMergeWarps][kMost], weights[kMostSplits], totals[2];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, d_size = a.head_size;
  const int64_t pair = static_cast<int64_t>(blockIdx.y) * a.heads + blockIdx.x;
  const int count = splits.count;
  // Every thread reads one split's maximum and sum; one warp reduces them.
  if (warp == 0) {
    float top = -INFINITY, total = 0.0f, largest[kMostSplits / 32], sum[kMostSplits / 32];
#pragma unroll
    for (int i = 0; i < kMostSplits / 32; ++i) {
      const int j = lane + 32 * i;
      largest[i] = j < count ? splits.largest[pair * count + j] : -INFINITY;
      sum[i] = j < count ? splits.sum[pair * count + j] : 0.0f;
      top = fmaxf(top, largest[i]);
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      top = fmaxf(top, gpu::shuffle_xor(top, offset));
    }
#pragma unroll
    for (int i = 0; i < kMostSplits / 32; ++i) {
      const float weight = largest[i] == -INFINITY ? 0.0f : gpu::exp2_approx(largest[i] - top);
      if (lane + 32 * i < count) weights[lane + 32 * i] = weight;
      total += sum[i] * weight;
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) total += gpu::shuffle_xor(total, offset);
    if (lane == 0) totals[0] = top, totals[1] = total;
  }
  const float* acc = splits.acc + pair * count * d_size;
  float4 o[2] = {};
  // The elements do not wait for the weights; an empty split has written none, and any bits count
  // as 0 there.
  for (int first = warp; first < count; first += kBatch * kMergeWarps) {
    float4 x[kBatch][2];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int j = first + b * kMergeWarps;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int d = lane * 4 + i * 128;
        if (j < count && d < d_size) {
          x[b][i] = *reinterpret_cast<const float4*>(acc + static_cast<int64_t>(j) * d_size + d);
        }
      }
    }
    if (first == warp) __syncthreads();
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int j = first + b * kMergeWarps;
      const float weight = j < count ? weights[j] : 0.0f;
      if (weight == 0.0f) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (lane * 4 + i * 128 >= d_size) break;
        o[i].x += x[b][i].x * weight, o[i].y += x[b][i].y * weight;
        o[i].z += x[b][i].z * weight, o[i].w += x[b][i].w * weight;
      }
    }
  }
  if (warp >= count) __syncthreads();  // the barrier of the loop above
#pragma unroll
  for (int i = 0; i < 2; ++i) *reinterpret_cast<float4*>(&shares[warp][lane * 4 + i * 128]) = o[i];
  __syncthreads();
  const float top = totals[0], total = totals[1];
  const float inverse = total > 0.0f ? 1.0f / (total + a.epsilon) : 0.0f;
  const int64_t s = blockIdx.y, h = blockIdx.x;
  T* out = static_cast<T*>(a.out) + s * a.out_stride + h * a.out_head_stride;
  for (int d = threadIdx.x; d < d_size; d += kMergeThreads) {
    float value = 0.0f;
#pragma unroll
    for (int j = 0; j < kMergeWarps; ++j) value += shares[j][d];
    out[d] = gpu::from_float<T>(value * inverse);
  }
  if (threadIdx.x == 0 && a.lse != nullptr) {
    a.lse[h * a.lse_head_stride + s * a.lse_sequence_stride] =
        total > 0.0f ? top * kLn2 + logf(total) : -INFINITY;
  }
}

// A few splits: a warp a query head, which needs nothing of other warps.
constexpr int kFewSplits = 8;

template <class T>
__global__ void __launch_bounds__(kThreads)
    merge_few_splits(const __grid_constant__ PagedAttentionArgs a, Splits splits) {
  gpu::begin_overlapped();
  const int lane = threadIdx.x % 32, count = splits.count;
  const int64_t pair = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (pair >= a.sequences * a.heads) return;
  const int64_t s = pair / a.heads, h = pair - s * a.heads;
  float largest[kFewSplits], sum[kFewSplits], top = -INFINITY, total = 0.0f;
#pragma unroll
  for (int j = 0; j < kFewSplits; ++j) {
    largest[j] = j < count ? splits.largest[pair * count + j] : -INFINITY;
    sum[j] = j < count ? splits.sum[pair * count + j] : 0.0f;
  }
#pragma unroll
  for (float x : largest) top = fmaxf(top, x);
#pragma unroll
  for (int j = 0; j < kFewSplits; ++j) {
    largest[j] = largest[j] == -INFINITY ? 0.0f : gpu::exp2_approx(largest[j] - top);
    total += sum[j] * largest[j];
  }
  Splits whole = splits;
  whole.count = 1;
  for (int d = lane * 4; d < a.head_size; d += 128) {
    float4 x[kFewSplits];
    float value[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < kFewSplits; ++j) {
      if (j >= count) break;
      x[j] = *reinterpret_cast<const float4*>(splits.acc + (pair * count + j) * a.head_size + d);
    }
#pragma unroll
    for (int j = 0; j < kFewSplits; ++j) {
      if (j >= count) break;
      value[0] += x[j].x * largest[j], value[1] += x[j].y * largest[j];
      value[2] += x[j].z * largest[j], value[3] += x[j].w * largest[j];
    }
    write_result(a, whole, s, h, 0, d, value, top, total);
  }
}

// The partitions of paged_attention_v2, normalized and rounded already: a thread per element.
template <class T>
__global__ void __launch_bounds__(kThreads)
    merge_partitions(const __grid_constant__ PagedAttentionArgs a) {
  gpu::begin_overlapped();
  const int64_t s = blockIdx.y, h = blockIdx.x, at = (s * a.heads + h) * a.partitions;
  const int count = (tokens_of(a, s) + kPartition - 1) / kPartition;
  const int d_size = static_cast<int>(a.head_size);
  const T* tmp = static_cast<const T*>(a.tmp_out) + at * d_size;
  T* out = static_cast<T*>(a.out) + s * a.out_stride + h * a.out_head_stride;
  float top = -INFINITY;
  for (int j = 0; j < count; ++j) top = fmaxf(top, a.max_logits[at + j]);
  for (int d = threadIdx.x; d < d_size; d += kThreads) {
    float value = 0.0f, total = 0.0f;
    for (int j = 0; j < count && top != -INFINITY; ++j) {
      const float weight = a.exp_sums[at + j] * expf(a.max_logits[at + j] - top);
      total += weight;
      value += gpu::to_float(tmp[static_cast<int64_t>(j) * d_size + d]) * weight;
    }
    out[d] = count == 1     ? tmp[d]
             : total > 0.0f ? gpu::from_float<T>(value / (total + a.epsilon))
                            : gpu::from_float<T>(0.0f);
  }
}

}  // namespace

int64_t paged_attention_scratch(const PagedAttentionArgs& a) {
  const int splits = shares_of(a).splits;
  if (splits == 1 || a.tmp_out != nullptr) return 0;
  return a.sequences * a.heads * splits * (a.head_size + 2) * int64_t{sizeof(float)};
}

void paged_attention(const PagedAttentionArgs& a, Stream stream) {
  const gpu::Stream s = gpu::stream_of(stream);
  const Shares shares = shares_of(a);
  Splits splits{shares.splits, nullptr, nullptr, nullptr, -1, shares.kv_heads};
  if (std::has_single_bit(static_cast<uint64_t>(a.block_size))) {
    splits.block_shift = std::countr_zero(static_cast<uint64_t>(a.block_size));
  }
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
      gpu::launch_overlapped("paged_attention", decode_any<decltype(type)>, grid, kThreads, s, a,
                             splits);
    });
  }
  if (splits.count == 1 && a.tmp_out == nullptr) return;
  const dim3 grid(static_cast<unsigned>(a.heads), static_cast<unsigned>(a.sequences));
  gpu::with_float(a.dtype, [&](auto type) {
    if (a.tmp_out != nullptr) {
      gpu::launch_overlapped("paged_attention (merge)", merge_partitions<decltype(type)>, grid,
                             kThreads, s, a);
    } else if (splits.count <= kFewSplits && a.head_size % 4 == 0) {
      const int64_t threads = a.sequences * a.heads * 32;
      gpu::launch_overlapped("paged_attention (merge)", merge_few_splits<decltype(type)>,
                             dim3(static_cast<unsigned>(gpu::ceil_div(threads, kThreads))),
                             kThreads, s, a, splits);
    } else {
      gpu::launch_overlapped("paged_attention (merge)", merge_splits<decltype(type)>, grid,
                             kMergeThreads, s, a, splits);
    }
  });
}

}  // namespace attention
