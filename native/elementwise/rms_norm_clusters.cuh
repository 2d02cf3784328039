// RMSNorm of a few rows on the GPU: a cluster of blocks owns a row, a thread one vector of it. The
// warps send the sums of their groups to all blocks, each of which adds them up for itself. One
// block for a row of 8192 values takes 0.4 us more (H200): 32 warps share four schedulers there.
#pragma once

#include "elementwise/rms_norm.cuh"
#include "prim/gpu_cluster.h"

namespace elementwise {

inline constexpr int kMostBlocks = 8;       // a cluster; more are not portable
inline constexpr int kMostInCluster = 256;  // threads per block

template <class T, bool kFused>
__global__ void __launch_bounds__(kMostInCluster)
    norm_in_cluster(const T* input, T* out, T* residual, const T* weight,
                    const __grid_constant__ FewRows a) {
  gpu::launch_dependents();
  using N = Norm<T, true, kFused, FewRows>;
  using K = typename N::K;
  const N n{input, out, residual, weight, a};
  __shared__ float sums[kMostBlocks * kMostInCluster / 32];
  __shared__ uint64_t inbox;
  const uint32_t block = blockIdx.x, blocks = gridDim.x;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int groups = static_cast<int>(blocks) * warps;
  if (threadIdx.x == 0) gpu::open_inbox(&inbox, groups * sizeof(float));
  gpu::arrive_in_cluster();

  const int64_t row = blockIdx.y;
  const Row at = {row, row * a.input_stride, row * a.residual_stride};
  const int first = (block * blockDim.x + threadIdx.x) * N::kN;
  const bool inside = first < a.hidden;
  T* z = kFused ? residual + at.residual : nullptr;
  gpu::dependency_wait();
  K v, add, weights;
  float square = 0.0f;
  if (inside) {
    gpu::load<true>(v, input + at.input + first);
    if constexpr (kFused) gpu::load<true>(add, z + first);
    if (weight != nullptr) gpu::load<true>(weights, weight + at.i * a.weight_stride + first);
    square = n.square(v, add, z, first);
  }
  const float sum = warp_sum(square);
  gpu::wait_for_cluster();  // all inboxes are open
  if (lane < blocks) gpu::send(&sums[block * warps + warp], &inbox, lane, sum);
  gpu::wait_for_inbox(&inbox);
  const float factor = factor_of(sums, groups, a);
  if (inside) n.scale(v, weights, factor, n.target(at, row), first);
}

// Whether that is quicker than a block a row, for rows of aligned vectors that rms_norm_parts.cuh
// does not take; measured on an H200 at 4096, 8192 and 16384 values.
inline bool spreads_over_clusters(const NormArgs& a, int64_t vecs, bool fused) {
  int64_t most_rows = fused && vecs > 256 ? 8 : 0;
  if (vecs > 512) most_rows = fused ? 32 : 16;
  return a.n0 <= most_rows && a.n1 * a.n2 == 1 && vecs <= kMostBlocks * kMostInCluster &&
         gpu::have_clusters();
}

template <class T, bool kFused>
void launch_in_clusters(const char* op, const NormArgs& a, const void* input, void* out,
                        int64_t vecs, gpu::Stream stream) {
  const int64_t wanted = gpu::ceil_div(vecs, 128),
                blocks = wanted < kMostBlocks ? wanted : kMostBlocks;
  const int64_t threads = gpu::ceil_div(gpu::ceil_div(vecs, blocks), 32) * 32;
  gpu::launch_overlapped_with({.cluster = static_cast<int>(blocks)}, op, norm_in_cluster<T, kFused>,
                              dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(a.n0)),
                              static_cast<int>(threads), stream, static_cast<const T*>(input),
                              static_cast<T*>(out), static_cast<T*>(a.residual),
                              static_cast<const T*>(a.weight), few_rows(a));
}

}  // namespace elementwise
