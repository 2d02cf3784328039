// RMSNorm of a few rows on the GPU, without a residual: some blocks per row, each of which sums the
// whole row for itself and scales a part of it. Reading a row of 16 KB again from the L2 is quicker
// than any exchange between blocks: 0.3 us less than a cluster, 0.6 less than one block (H200).
#pragma once

#include "elementwise/rms_norm.cuh"
#include "prim/gpu_launch.h"

namespace elementwise {

inline constexpr int kParts = 4;
inline constexpr int kPartThreads = 512;

// kHeld vectors per thread: the row has at most kHeld * kPartThreads.
template <class T, int kHeld>
__global__ void __launch_bounds__(kPartThreads)
    norm_in_parts(const T* input, T* out, const T* weight, const __grid_constant__ FewRows a) {
  gpu::launch_dependents();
  using N = Norm<T, true, false, FewRows>;
  using K = typename N::K;
  const N n{input, out, nullptr, weight, a};
  constexpr int kWarps = kPartThreads / 32;
  __shared__ float sums[kHeld * kWarps];
  const int64_t row = blockIdx.y;
  const int part = ((a.hidden / N::kN + kParts - 1) / kParts) * N::kN;
  const int first = blockIdx.x * part + threadIdx.x * N::kN;
  const bool inside = static_cast<int>(threadIdx.x) * N::kN < part && first < a.hidden;
  input += row * a.input_stride;
  gpu::dependency_wait();
  K v[kHeld], own, weights;
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    const int at = (h * kPartThreads + threadIdx.x) * N::kN;
    if (at < a.hidden) gpu::load<true>(v[h], input + at);
  }
  if (inside) {
    gpu::load<true>(own, input + first);
    if (weight != nullptr) gpu::load<true>(weights, weight + row * a.weight_stride + first);
  }
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    const int at = (h * kPartThreads + threadIdx.x) * N::kN;
    const float sum = warp_sum(at < a.hidden ? n.square(v[h], v[h], nullptr, at) : 0.0f);
    if (threadIdx.x % 32 == 0) sums[h * kWarps + threadIdx.x / 32] = sum;
  }
  __syncthreads();
  // Warps whose every lane is past the part are done, the others stay whole.
  if (static_cast<int>(threadIdx.x / 32 * 32) * N::kN >= part) return;
  const float factor = factor_of(sums, kHeld * kWarps, a);
  if (inside) n.scale(own, weights, factor, out + row * a.hidden, first);
}

// Whether that is quicker than a block a row, for rows of aligned vectors (measured on an H200 at
// 2048 to 16384 values, where a cluster is quicker); and whether it is right: no block may
// overwrite what another has yet to read.
inline bool divides_into_parts(const NormArgs& a, const void* input, const void* out, int64_t vecs,
                               int64_t item_bytes) {
  if (a.n0 > 16 || a.n1 * a.n2 != 1 || vecs <= 128 || vecs > 2 * kPartThreads) return false;
  const auto from = reinterpret_cast<intptr_t>(input), to = reinterpret_cast<intptr_t>(out);
  const int64_t row = a.hidden * item_bytes, step = a.input_stride0 * item_bytes;
  return step >= 0 && (from + (a.n0 - 1) * step + row <= to || to + a.n0 * row <= from);
}

template <class T>
void launch_in_parts(const char* op, const NormArgs& a, const void* input, void* out, int64_t vecs,
                     gpu::Stream stream) {
  auto go = [&](auto kernel) {
    gpu::launch_overlapped(op, kernel, dim3(kParts, static_cast<unsigned>(a.n0)), kPartThreads,
                           stream, static_cast<const T*>(input), static_cast<T*>(out),
                           static_cast<const T*>(a.weight), few_rows(a));
  };
  vecs <= kPartThreads ? go(norm_in_parts<T, 1>) : go(norm_in_parts<T, 2>);
}

}  // namespace elementwise
