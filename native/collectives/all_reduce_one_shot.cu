// One-shot all-reduce: every thread pushes a vector into a slot in every peer, then polls its own
// slots for the peers' vectors of the same index and adds them. One trip over the link, no barrier:
// a vector is its own arrival flag.
//
// One vector a thread is the fastest at every size: what a thread does once must be fetched by its
// multiprocessor, so a microsecond's worth of kernel has no instruction to spare. Blocks that are
// not resident yet start as others end; they start in order on every rank, so a block's
// counterparts always come to run. With fewer blocks than that, or vectors that are not whole,
// threads go round in a kernel of their own.
#include <algorithm>
#include <type_traits>

#include "collectives/collectives.h"
#include "collectives/dispatch.h"
#include "collectives/lamport.h"
#include "prim/gpu_launch.h"

namespace collectives {
namespace {

// What the number of blocks decides.
//   kSmall  one poll at a time
//   kMany   from kManyBlocks on, which was measured on two H200: polls by turns
//   kLarge  more than there are state words. Moves so much that it would push out of the L2 what
//           the kernels around it need: its slots, which nobody reads for two calls, go first
enum class Grid { kSmall, kMany, kLarge };
constexpr int kManyBlocks = 64;

// One aligned vector a thread. The order of the parameters: see Workspace.
template <typename T, int W, Grid kGrid>
__global__ void __launch_bounds__(kMaxThreads)
    one_shot_kernel(const uint4* inp, uint4* out, uint32_t vectors,
                    const __grid_constant__ Workspace ws) {
  Call<kGrid != Grid::kLarge> call(ws);
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  const bool inside = i < vectors;
  const uint64_t offset = uint64_t{i} * gpu::kVectorBytes;
  inp += i;
  out += i;
  char* ours = ws.slots() + offset;
  char* theirs[W];  // in the peer 1, 2, ... ranks on: not everybody to the same peer at once
  uint64_t all = call.prepared() | ws.second_slot | reinterpret_cast<uint64_t>(inp) |
                 reinterpret_cast<uint64_t>(out) | reinterpret_cast<uint64_t>(ours);
#pragma unroll
  for (int turn = 1; turn < W; ++turn) {
    theirs[turn] = ws.pushes[turn - 1] + offset;
    all |= reinterpret_cast<uint64_t>(theirs[turn]);
  }
  // Never true. Parameters and arithmetic are there before the wait is over, while compilers would
  // put them off until they are needed; but not across a branch on them.
  if (all == 0) return;
  gpu::dependency_wait();
  uint4 own = {};
  if (inside) own = *inp;
  if (!call.enter()) return;
  const uint64_t slot = ws.slot_of(call.epoch);
  if (inside) {
#pragma unroll
    for (int turn = 1; turn < W; ++turn) {
      gpu::send_lamport(reinterpret_cast<uint4*>(theirs[turn] + slot), own);
    }
  }
  // Blocks of the next kernel that start sooner get in the way of these stores.
  gpu::launch_dependents();
  call.settle(ws);
  if (inside) {
    ours += slot;
    gpu::Spin spin;
    uint4 peers[W - 1];
    if constexpr (W == 2 && kGrid != Grid::kSmall) {
      const auto* from = reinterpret_cast<const uint4*>(ours);
      peers[0] = receive_by_turns(from, ws, spin, 1 - ws.rank, call.epoch, i);
    } else {
      receive_from_peers<W>(peers, ours, ws.slot_stride, ws, spin, call.epoch, i);
    }
    *out = rank_ordered_sum<T, W>(own, peers, ws.rank);
#pragma unroll
    for (int k = 0; k < W - 1; ++k) {
      auto* done = reinterpret_cast<uint4*>(ours + k * ws.slot_stride);
      if constexpr (kGrid == Grid::kLarge) {
        gpu::clear_lamport(done, gpu::evict_first());
      } else {
        gpu::clear_lamport(done);
      }
    }
  }
  call.leave();
}

// Any number of vectors a thread, one after the other, at any alignment.
template <typename T, int W>
__global__ void __launch_bounds__(kMaxThreads)
    one_shot_rounds_kernel(const __grid_constant__ Workspace ws, const gpu::SpanOf<T> inp,
                           const gpu::SpanOf<T> out, uint32_t vectors) {
  Call<> call(ws);
  const uint32_t step = gridDim.x * blockDim.x;
  uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  gpu::dependency_wait();
  gpu::launch_dependents();
  if (!call.enter()) return;
  const uint64_t slot = ws.slot_of(call.epoch);
  char* ours = ws.slots() + slot;
  gpu::Spin spin;
  for (bool settled = false; !settled || i < vectors; settled = true, i += step) {
    const uint64_t place = uint64_t{i} * gpu::kVectorBytes;
    uint4 own = {};
    if (i < vectors) {
      own = inp.load(i);
#pragma unroll
      for (int turn = 1; turn < W; ++turn) {
        gpu::send_lamport(reinterpret_cast<uint4*>(ws.pushes[turn - 1] + slot + place), own);
      }
    }
    if (!settled) call.settle(ws);
    if (i >= vectors) break;
    uint4 peers[W - 1];
    receive_from_peers<W>(peers, ours + place, ws.slot_stride, ws, spin, call.epoch, i);
    out.store(i, rank_ordered_sum<T, W>(own, peers, ws.rank));
#pragma unroll
    for (int k = 0; k < W - 1; ++k) {
      gpu::clear_lamport(reinterpret_cast<uint4*>(ours + place + k * ws.slot_stride));
    }
  }
  call.leave();
}

// Measured on two H200. Few threads a block spread a small message over many multiprocessors; many
// keep the grid of a large one small (class Call).
int threads_for(uint64_t vectors) {
  if (vectors <= 256) return 256;
  if (vectors <= 4096) return 128;
  if (vectors <= 128 * 1024) return 256;
  return 512;
}

}  // namespace

uint64_t one_shot_limit(const Workspace& ws) { return ws.slot_stride; }

void all_reduce_one_shot(const Workspace& ws, DType dtype, const void* inp, void* out,
                         uint64_t bytes, const Shape& shape, gpu::Stream stream) {
  const uint64_t vectors = vectors_of(bytes);
  const int threads = std::min(threads_for(vectors), kMaxThreads);
  const uint64_t needed = (vectors + threads - 1) / threads;
  const int blocks = at_most(needed, shape.blocks > 0 ? shape.blocks : needed);
  const gpu::LaunchConfig config{blocks, threads, stream, shape.overlap};
  const auto count = static_cast<uint32_t>(vectors);
  by_dtype(dtype, [&](auto type) {
    by_world(ws.world, [&](auto world) {
      using T = typename decltype(type)::type;
      constexpr int W = decltype(world)::value;
      const gpu::SpanOf<T> from(inp, bytes);
      const gpu::SpanOf<T> to(out, bytes);
      const bool one_each =
          static_cast<uint64_t>(blocks) == needed && from.all_whole() && to.all_whole();
      if (!one_each) {
        return gpu::launch<one_shot_rounds_kernel<T, W>>(config, "all_reduce_one_shot", ws, from,
                                                         to, count);
      }
      const auto* whole_inp = static_cast<const uint4*>(inp);
      auto* whole_out = static_cast<uint4*>(out);
      const auto launch = [&]<Grid kGrid>(std::integral_constant<Grid, kGrid>) {
        gpu::launch<one_shot_kernel<T, W, kGrid>>(config, "all_reduce_one_shot", whole_inp,
                                                  whole_out, count, ws);
      };
      if (blocks > kStateWords) return launch(std::integral_constant<Grid, Grid::kLarge>{});
      if constexpr (W == 2) {  // with more peers the polls of one thread are many already
        if (blocks >= kManyBlocks) return launch(std::integral_constant<Grid, Grid::kMany>{});
      }
      launch(std::integral_constant<Grid, Grid::kSmall>{});
    });
  });
}

}  // namespace collectives
