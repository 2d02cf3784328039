// Reading Lamport vectors (prim/gpu_packet.h) that peers push: shared by the kernels that add.
#pragma once

#include "collectives/workspace.h"
#include "prim/gpu_vec.h"

namespace collectives {

// One vector from each of N slots, all loads in flight together; polls until none is empty. Slots
// may be null. `sender(k)` names the sender of slot k in a report.
template <int N, typename Sender>
__device__ __forceinline__ void receive_lamport(uint4 (&values)[N], uint4* const (&slots)[N],
                                                const Workspace& ws, gpu::Spin& spin,
                                                uint64_t epoch, uint64_t position, Sender sender) {
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

// The same for one vector of every peer, whose slots are `stride` bytes apart from `first` on.
// values[k] is from the peer in place k (Workspace::place).
template <int W>
__device__ __forceinline__ void receive_from_peers(uint4 (&values)[W - 1], const char* first,
                                                   uint64_t stride, const Workspace& ws,
                                                   gpu::Spin& spin, uint64_t epoch,
                                                   uint64_t position) {
  const auto slot = [&](int k) { return reinterpret_cast<const uint4*>(first + k * stride); };
#pragma unroll
  for (int k = 0; k < W - 1; ++k) values[k] = gpu::ld_relaxed_sys(slot(k));
  spin.begin();
  for (;;) {
    int late = -1;
#pragma unroll
    for (int k = 0; k < W - 1; ++k) {
      if (gpu::is_empty(values[k])) {
        values[k] = gpu::ld_relaxed_sys(slot(k));
        late = k;
      }
    }
    if (late < 0) return;
    const uint32_t peer = late + (late >= static_cast<int>(ws.rank) ? 1 : 0);
    if (spin.give_up(ws.spin, peer, epoch, position, 0, gpu::kEmpty)) return;
  }
}

// One vector from one slot, by two polls that are on their way at different times: it is seen half
// a poll's trip sooner. The pause keeps them apart; 20 to 100 ns are as good, more is not.
__device__ __forceinline__ uint4 receive_by_turns(const uint4* slot, const Workspace& ws,
                                                  gpu::Spin& spin, uint32_t sender, uint64_t epoch,
                                                  uint64_t position) {
  uint4 value = gpu::ld_relaxed_sys(slot);
  spin.begin();
  while (gpu::is_empty(value)) {
    const uint4 sooner = gpu::ld_relaxed_sys(slot);
    gpu::nap(50);
    value = gpu::ld_relaxed_sys(slot);
    if (!gpu::is_empty(sooner)) return sooner;
    if (spin.give_up(ws.spin, sender, epoch, position, 0, gpu::kEmpty)) break;
  }
  return value;
}

// Returns when one lane a warp has seen the warp's last vector arrive; the others' are then there
// or near. Takes a thirtieth of the L2's time that polling by all lanes takes, and one more trip.
// By whole warps; `slot` may be null.
__device__ __forceinline__ void wait_for_warp(const uint4* slot, const Workspace& ws,
                                              gpu::Spin& spin, uint64_t epoch, uint64_t position,
                                              uint32_t sender) {
  if (threadIdx.x % 32 == 31 && slot != nullptr) {
    spin.begin();
    while (gpu::is_empty(gpu::ld_relaxed_sys(slot))) {
      if (spin.give_up(ws.spin, sender, epoch, position, 0, gpu::kEmpty)) break;
    }
  }
  gpu::sync_warp();
}

// Words, not addresses, are chosen: an array that is addressed lies in memory on AMD GPUs.
__device__ __forceinline__ uint4 choose(bool first, uint4 a, uint4 b) {
  return make_uint4(first ? a.x : b.x, first ? a.y : b.y, first ? a.z : b.z, first ? a.w : b.w);
}

// Sum in rank order in fp32, rounded once. peers[k] is from the peer in place k.
template <typename T, int W>
__device__ __forceinline__ uint4 rank_ordered_sum(uint4 own, const uint4 (&peers)[W - 1],
                                                  uint32_t rank) {
  if constexpr (W == 2) return gpu::sum_of_two<T>(own, peers[0]);
  const auto of = [&](int r) {  // all indices are known when this is compiled
    if (r == static_cast<int>(rank)) return own;
    if (r == 0) return peers[0];
    if (r == W - 1) return peers[W - 2];
    return choose(r < static_cast<int>(rank), peers[r], peers[r - 1]);
  };
  gpu::Floats<T> sum(of(0));
#pragma unroll
  for (int r = 1; r < W; ++r) gpu::accumulate(sum, gpu::Floats<T>(of(r)));
  return sum.rounded();
}

}  // namespace collectives
