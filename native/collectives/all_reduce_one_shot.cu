// One-shot all-reduce: every thread pushes a vector into a slot in every peer, then polls its own
// slots for the peers' vectors of the same index and adds them. One trip over the link, no barrier:
// a vector is its own arrival flag.
//
// One vector a thread is the fastest at every size. Blocks that are not resident yet start as
// others end; they start in order on every rank, so a block's counterparts always come to run. With
// fewer blocks than that, threads go round.
#include "collectives/collectives.h"
#include "collectives/dispatch.h"
#include "collectives/marked.h"
#include "prim/gpu_launch.h"

namespace collectives {
namespace {

constexpr int kMaxThreads = 512;

template <typename T, int W, bool kWhole>
__global__ void __launch_bounds__(kMaxThreads)
    one_shot_kernel(const __grid_constant__ Workspace ws, const gpu::SpanOf<T, kWhole> inp,
                    const gpu::SpanOf<T, kWhole> out, uint32_t vectors, bool drain) {
  // Everything that comes from the parameters is ready before the predecessor ends.
  Call call(ws);
  const uint32_t step = gridDim.x * blockDim.x;
  uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  char* theirs[W];  // where this rank writes, in the peer `turn` ranks on
#pragma unroll
  for (int turn = 1; turn < W; ++turn) {
    // Not everybody to the same peer at once.
    theirs[turn] = ws.slot_area((ws.rank + turn) % W, ws.rank);
  }
  char* ours = ws.base[ws.rank] + ws.layout.slot_offset(0);
  gpu::dependency_wait();
  gpu::launch_dependents();
  uint4 own = {};
  if (i < vectors) own = inp.load(i);
  if (!call.enter(ws)) return;
  const uint64_t slot = ws.slot_of(call.epoch);
  gpu::Spin spin;
  for (bool settled = false;; settled = true) {
    const uint64_t place = slot + uint64_t{i} * gpu::kVectorBytes;
    if (i < vectors) {
#pragma unroll
      for (int turn = 1; turn < W; ++turn) {
        gpu::send_marked(reinterpret_cast<uint4*>(theirs[turn] + place), own);
      }
    }
    if (!settled) call.settle(ws, drain);
    if (i < vectors) {
      uint4 peers[W - 1];
      receive_from_peers<W>(peers, ours + place, ws.slot_stride, ws, spin, call.epoch, i);
      out.store(i, rank_ordered_sum<T, W>(own, peers, ws.rank));
#pragma unroll
      for (int k = 0; k < W - 1; ++k) {
        gpu::clear_marked(reinterpret_cast<uint4*>(ours + place + k * ws.slot_stride));
      }
    }
    i += step;
    if (i >= vectors) break;
    own = inp.load(i);
  }
  call.leave(ws);
}

}  // namespace

uint64_t one_shot_limit(const Workspace& ws) { return ws.slot_stride; }

void all_reduce_one_shot(const Workspace& ws, Dtype dtype, const void* inp, void* out,
                         uint64_t bytes, const Shape& shape, gpu::Stream stream) {
  const uint64_t vectors = vectors_of(bytes);
  const int threads =
      shape.threads > 0 ? shape.threads : (vectors > 128 && vectors <= 4096 ? 128 : 256);
  const uint64_t needed = (vectors + threads - 1) / threads;
  const int blocks = at_most(needed, shape.blocks > 0 ? shape.blocks : needed);
  // Polls of a small grid that start at once get in the way of its own stores.
  const bool drain = shape.drain > 0 ? shape.drain == 2 : blocks <= kStateWords;
  by_dtype(dtype, [&](auto type) {
    by_world(ws.world, [&](auto world) {
      using T = typename decltype(type)::type;
      const auto go = [&](auto whole) {
        constexpr bool kWhole = decltype(whole)::value != 0;
        gpu::launch<one_shot_kernel<T, decltype(world)::value, kWhole>>(
            {blocks, threads, stream, shape.overlap}, "all_reduce_one_shot", ws,
            gpu::SpanOf<T, kWhole>(inp, bytes), gpu::SpanOf<T, kWhole>(out, bytes),
            static_cast<uint32_t>(vectors), drain);
      };
      const gpu::SpanOf<T> from(inp, bytes);
      const gpu::SpanOf<T> to(out, bytes);
      if (from.all_whole() && to.all_whole()) return go(Number<1>{});
      return go(Number<0>{});
    });
  });
}

}  // namespace collectives
