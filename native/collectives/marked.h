// Reading marked vectors that peers push: shared by the kernels that add.
#pragma once

#include "collectives/workspace.h"
#include "prim/gpu_vec.h"

namespace collectives {

// One vector from each of N slots, all loads in flight together; polls until none is empty.
// `sender(k)` names the sender of slot k in a report.
template <int N, typename Sender>
__device__ __forceinline__ void receive_marked(uint4 (&values)[N], uint4* const (&slots)[N],
                                               const Workspace& ws, gpu::Spin& spin, uint64_t epoch,
                                               uint64_t position, Sender sender) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if (slots[k] != nullptr) values[k] = gpu::ld_relaxed_sys(slots[k]);
  }
  spin.begin();
  for (;;) {
    int late = -1;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (slots[k] != nullptr && gpu::is_empty(values[k])) {
        values[k] = gpu::ld_relaxed_sys(slots[k]);
        late = k;
      }
    }
    if (late < 0) return;
    if (spin.give_up(ws.spin, sender(late), epoch, position, 0, gpu::kEmpty)) return;
  }
}

// Sum in rank order in fp32, rounded once. values[k], for k < W, is rank k's vector.
template <typename T, int W>
__device__ __forceinline__ uint4 rank_ordered_sum(const uint4* values) {
  gpu::Floats<T> sum(values[0]);
#pragma unroll
  for (int k = 1; k < W; ++k) gpu::accumulate(sum, gpu::Floats<T>(values[k]));
  return sum.rounded();
}

}  // namespace collectives
