// One-shot all-reduce, for small messages: every thread pushes its vectors into a slot in every peer,
// then polls its own slots for the peers' vectors of the same index and adds them. One trip over the
// link, no barrier: a vector is its own arrival flag.
#include "collectives/collectives.h"
#include "collectives/dispatch.h"
#include "collectives/marked.h"
#include "prim/gpu_launch.h"

namespace collectives {
namespace {

constexpr int kMaxThreads = 512;

template <typename T, int W, int U, bool kWhole>
__global__ void __launch_bounds__(kMaxThreads)
    one_shot_kernel(const __grid_constant__ Workspace ws, const gpu::SpanOf<T, kWhole> inp,
                    const gpu::SpanOf<T, kWhole> out, uint32_t vectors) {
  // Everything that comes from the parameters is ready before the predecessor ends.
  Call call(ws);
  const uint32_t step = gridDim.x * blockDim.x;
  const uint32_t first = blockIdx.x * blockDim.x + threadIdx.x;
  uint4* theirs[W];  // where this rank writes, in the peer `turn` ranks on
  uint4* ours[W];    // where rank r writes here
#pragma unroll
  for (int k = 0; k < W; ++k) {
    const uint32_t peer = (ws.rank + k) % W;  // not everybody to the same peer at once
    if (k > 0) theirs[k] = reinterpret_cast<uint4*>(ws.slot_area(peer, ws.rank)) + first;
    ours[k] = reinterpret_cast<uint4*>(ws.slot_area(ws.rank, k)) + first;
  }
  gpu::dependency_wait();
  gpu::launch_dependents();
  uint4 own[U];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (first + u * step < vectors) own[u] = inp.load(first + u * step);
  }
  if (!call.enter(ws)) return;
  const uint64_t slot = ws.slot_of(call.epoch) / gpu::kVectorBytes;
#pragma unroll
  for (int turn = 1; turn < W; ++turn) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (first + u * step < vectors) {
        gpu::send_marked(theirs[turn] + slot + u * step, own[u]);
      }
    }
  }
  call.settle(ws);
  // Vectors of one group are polled together: one trip to the L2 instead of one each.
  constexpr int kGroup = U * W <= 8 ? U : 1;
  gpu::Spin spin;
#pragma unroll
  for (int g = 0; g < U; g += kGroup) {
    uint4 values[kGroup * W];
    uint4* slots[kGroup * W];
#pragma unroll
    for (int k = 0; k < kGroup * W; ++k) {
      const uint32_t i = first + (g + k / W) * step;
      const bool self = k % W == static_cast<int>(ws.rank);
      slots[k] = self || i >= vectors ? nullptr : ours[k % W] + slot + (g + k / W) * step;
      if (self) values[k] = own[g + k / W];
    }
    receive_marked(values, slots, ws, spin, call.epoch, first, [](int k) { return k % W; });
#pragma unroll
    for (int u = 0; u < kGroup; ++u) {
      const uint32_t i = first + (g + u) * step;
      if (i < vectors) out.store(i, rank_ordered_sum<T, W>(values + u * W));
    }
#pragma unroll
    for (int k = 0; k < kGroup * W; ++k) {
      if (slots[k] != nullptr) gpu::clear_marked(slots[k]);
    }
  }
  call.leave();
}

}  // namespace

uint64_t one_shot_limit(const Workspace& ws) { return ws.slot_stride; }

void all_reduce_one_shot(const Workspace& ws, Dtype dtype, const void* inp, void* out,
                         uint64_t bytes, const Shape& shape, gpu::Stream stream) {
  const uint64_t vectors = vectors_of(bytes);
  const int threads = shape.threads > 0 ? shape.threads : (vectors <= 16384 ? 128 : 256);
  int unroll = shape.unroll > 0 ? shape.unroll : 1;
  // One vector a thread is fastest at any size: blocks that are not resident yet start as others
  // end. They start in order on every rank, so a block's counterparts always come to run.
  while (unroll < 8 && shape.blocks > 0 &&
         vectors > static_cast<uint64_t>(shape.blocks) * threads * unroll) {
    unroll *= 2;
  }
  const int blocks = static_cast<int>((vectors + threads * unroll - 1) / (threads * unroll));
  by_dtype(dtype, [&](auto type) {
    by_world(ws.world, [&](auto world) {
      using T = typename decltype(type)::type;
      constexpr int W = decltype(world)::value;
      const gpu::SpanOf<T> from(inp, bytes);
      const gpu::SpanOf<T> to(out, bytes);
      const auto go = [&](auto number, auto whole) {
        constexpr bool kWhole = decltype(whole)::value != 0;
        gpu::launch({blocks, threads, stream, shape.overlap}, "all_reduce_one_shot",
                    one_shot_kernel<T, W, decltype(number)::value, kWhole>, ws,
                    gpu::SpanOf<T, kWhole>(inp, bytes), gpu::SpanOf<T, kWhole>(out, bytes),
                    static_cast<uint32_t>(vectors));
      };
      const auto pick = [&](auto whole) {
        if (unroll == 1) return go(Number<1>{}, whole);
        if (unroll == 2) return go(Number<2>{}, whole);
        if (unroll == 4) return go(Number<4>{}, whole);
        return go(Number<8>{}, whole);
      };
      if (from.all_whole() && to.all_whole()) return pick(Number<1>{});
      return pick(Number<0>{});
    });
  });
}

}  // namespace collectives
