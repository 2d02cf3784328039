// Before the first call on a workspace: waits until every peer has prepared its own. A kernel of
// its own, so that no other kernel has to look.
#include "collectives/collectives.h"
#include "prim/gpu_launch.h"

namespace collectives {
namespace {

__global__ void meet_kernel(const __grid_constant__ Workspace ws) {
  gpu::dependency_wait();
  gpu::Spin spin;
  for (uint32_t peer = 0; peer < ws.world; ++peer) {
    spin.begin();
    while (peer != ws.rank && gpu::ld_relaxed_sys(&ws.mine().alive[peer]) == 0) {
      if (spin.give_up(ws.spin, peer, 0, 0, 1, 0)) return;
    }
  }
}

}  // namespace

void meet(const Workspace& ws, gpu::Stream stream) {
  gpu::launch<meet_kernel>({1, 1, stream, false}, "meet", ws);
}

}  // namespace collectives
