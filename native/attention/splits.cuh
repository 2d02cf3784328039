// How decode attention on the GPU shares a sequence's tokens among blocks, and where a block leaves
// its result: the final one, a share for the merge of the splits, or a partition of
// paged_attention_v2.
#pragma once

#include <cfloat>
#include <type_traits>

#include "attention/attention.h"
#include "prim/gpu_floats.h"

namespace attention {

inline constexpr int kWarps = 4, kThreads = 32 * kWarps;
inline constexpr int kPartition = 512;  // tokens of a partition of paged_attention_v2
inline constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Where a block leaves its share when there are several: [S, Hq, splits] of D floats, then the
// maxima (base 2) and the sums.
struct Splits {
  int count;
  float *acc, *largest, *sum;
  int block_shift;  // log2 of the block size, or -1
  int kv_heads;     // of a block: 1 or 2
};

// Tokens of a sequence that its table can name.
__device__ inline int tokens_of(const PagedAttentionArgs& a, int64_t s) {
  const int64_t reach = min(a.table_width * a.block_size, a.longest);
  return static_cast<int>(max(int64_t{0}, min(int64_t{a.lens[s]}, reach)));
}

// Tokens [first, last) of a split: partitions of v2, or equal shares in whole tiles.
__device__ inline void split_of(const PagedAttentionArgs& a, int n, int split, int splits,
                                int& first, int& last) {
  const int share = (n + splits - 1) / splits;
  const int size = a.tmp_out != nullptr ? kPartition : (share + 63) / 64 * 64;
  first = min(split * size, n);
  last = min(first + size, n);
}

// Elements [d, d + kCount) of one query head's sum over one split, not yet normalized.
template <int kCount>
__device__ inline void write_result(const PagedAttentionArgs& a, const Splits& splits, int64_t s,
                                    int64_t h, int split, int d, const float (&value)[kCount],
                                    float largest, float sum) {
  const float inverse = sum > 0.0f ? 1.0f / (sum + a.epsilon) : 0.0f;
  auto write_as = [&](auto* out) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      out[i] = gpu::from_float<std::remove_pointer_t<decltype(out)>>(value[i] * inverse);
    }
  };
  auto write = [&](void* out, int64_t at) {
    switch (a.dtype) {
      case DType::kFloat32:
        return write_as(static_cast<float*>(out) + at);
      case DType::kFloat16:
        return write_as(static_cast<gpu::Half*>(out) + at);
      default:
        return write_as(static_cast<gpu::BFloat16*>(out) + at);
    }
  };
  if (a.tmp_out != nullptr) {
    const int64_t at = (s * a.heads + h) * a.partitions + split;
    write(a.tmp_out, at * a.head_size + d);
    if (d == 0) {
      a.max_logits[at] = largest <= -FLT_MAX ? largest : largest * kLn2;
      a.exp_sums[at] = sum;
    }
    return;
  }
  if (splits.count > 1) {
    const int64_t at = (s * a.heads + h) * splits.count + split;
    gpu::Vec<float, kCount> all;
#pragma unroll
    for (int i = 0; i < kCount; ++i) all.at[i] = value[i];
    gpu::store<true>(splits.acc + at * a.head_size + d, all);
    if (d == 0) {
      splits.largest[at] = largest;
      splits.sum[at] = sum;
    }
    return;
  }
  write(a.out, s * a.out_stride + h * a.out_head_stride + d);
  if (d == 0 && a.lse != nullptr) {
    a.lse[h * a.lse_head_stride + s * a.lse_sequence_stride] =
        sum > 0.0f ? largest * kLn2 + logf(sum) : -INFINITY;
  }
}

// A split without tokens: nothing for v2, and zeros for the merge, which reads them all.
__device__ inline void write_nothing(const PagedAttentionArgs& a, const Splits& splits, int64_t s,
                                     int64_t first_head, int heads, int split) {
  if (a.tmp_out != nullptr) return;  // "partitions past the sequence are not written"
  const int d_size = static_cast<int>(a.head_size);
  for (int i = threadIdx.x; i < heads * d_size; i += blockDim.x) {
    write_result<1>(a, splits, s, first_head + i / d_size, split, i % d_size, {0.0f}, -INFINITY,
                    0.0f);
  }
}

}  // namespace attention
