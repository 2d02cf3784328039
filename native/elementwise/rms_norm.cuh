// One row of RMSNorm on the GPU, vector by vector: what all kernels do to it.
//
// The order of a row's sum depends on the hidden size alone, whatever the launch: 32 vectors that
// follow each other, a group, are summed by a butterfly; the groups' sums by a second one.
#pragma once

#include "elementwise/elementwise.h"
#include "prim/gpu_floats.h"
#include "prim/gpu_shuffle.h"

namespace elementwise {

struct NormArgs : FusedAddRmsNormArgs {
  float inverse_hidden;
};

// What a row costs before its first load counts here, and so does each line of parameters.
struct FewRows {
  int64_t input_stride, residual_stride, weight_stride;  // elements between rows
  int hidden;
  float inverse_hidden, epsilon;
};

inline FewRows few_rows(const NormArgs& a) {
  return {a.input_stride0,  a.residual_stride0, a.weight_stride, static_cast<int>(a.hidden),
          a.inverse_hidden, a.epsilon};
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += gpu::shuffle_xor(x, offset);
  return x;
}

// What a row is multiplied by, of its groups' sums of squares. To be called by whole warps.
template <class Args>
__device__ float factor_of(const float* sums, int groups, const Args& a) {
  float total = 0.0f;
  for (int g = threadIdx.x % 32; g < groups; g += 32) total += sums[g];
  return rsqrtf(warp_sum(total) * a.inverse_hidden + a.epsilon);
}

struct Row {
  int64_t i, input, residual;  // index of dim 0, element offsets
};

__device__ inline Row row_of(const NormArgs& a, int64_t row) {
  if (a.n1 * a.n2 == 1) return {row, row * a.input_stride0, row * a.residual_stride0};
  const int64_t k = row % a.n2, j = row / a.n2 % a.n1, i = row / a.n2 / a.n1;
  return {i, i * a.input_stride0 + j * a.input_stride1 + k * a.input_stride2,
          i * a.residual_stride0 + j * a.residual_stride1 + k * a.residual_stride2};
}

// Args has hidden.
template <class T, bool kAligned, bool kFused, class Args = NormArgs>
struct Norm {
  static constexpr int kN = gpu::kVec<T>;
  using V = gpu::Vec<T, kN>;
  using K = gpu::Kept<V>;
  const T* input;
  T *out, *residual;
  const T* weight;
  const Args& a;

  __device__ int count(int first) const { return min(static_cast<int>(a.hidden) - first, kN); }
  // Adds the residual and keeps the sum of both; returns the sum of squares.
  __device__ float square(K& kept, const K& other, T* z, int first) const {
    V v = kept.get();
    if constexpr (kFused) {
      const V r = other.get();
#pragma unroll
      for (int j = 0; j < kN; j += 2) {
        const float2 x = gpu::pair_at(v, j), y = gpu::pair_at(r, j);
        gpu::set_pair(v, j, {x.x + y.x, x.y + y.y});
      }
      kept = v;
      gpu::store<kAligned>(z + first, v, count(first));
    }
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const float f = gpu::to_float(v.at[j]);
      sum += kAligned || j < count(first) ? f * f : 0.0f;
    }
    return sum;
  }
  __device__ void scale(const K& kept, const K& weights, float factor, T* y, int first) const {
    const V v = kept.get(), w = weights.get();
    V result;
#pragma unroll
    for (int j = 0; j < kN; j += 2) {
      const float2 x = gpu::pair_at(v, j);
      const float2 by = weight == nullptr ? float2{1.0f, 1.0f} : gpu::pair_at(w, j);
      gpu::set_pair(result, j, {x.x * factor * by.x, x.y * factor * by.y});
    }
    gpu::store<kAligned>(y + first, result, count(first));
  }
  __device__ T* target(const Row& at, int64_t row) const {
    return kFused ? out + at.input : out + row * a.hidden;
  }
};

}  // namespace elementwise
