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

template <typename T, int W, int U>
__global__ void __launch_bounds__(kMaxThreads)
    one_shot_kernel(const __grid_constant__ Workspace ws, const gpu::SpanOf<T> inp,
                    const gpu::SpanOf<T> out, uint32_t vectors) {
  gpu::dependency_wait();
  gpu::launch_dependents();
  const uint32_t step = gridDim.x * blockDim.x;
  const uint32_t first = blockIdx.x * blockDim.x + threadIdx.x;
  uint4 own[U];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (first + u * step < vectors) own[u] = inp.load(first + u * step);
  }
  const Entry entry = enter(ws);
  if (!entry.ok) return;
#pragma unroll
  for (int turn = 1; turn < W; ++turn) {
    const uint32_t peer = (ws.rank + turn) % W;  // not everybody to the same peer at once
    uint4* area = ws.slot_area(peer, entry.epoch, ws.rank);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (first + u * step < vectors) gpu::send_marked(area + first + u * step, own[u]);
    }
  }
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
      slots[k] = self || i >= vectors ? nullptr : ws.slot_area(ws.rank, entry.epoch, k % W) + i;
      if (self) values[k] = own[g + k / W];
    }
    receive_marked(values, slots, ws, spin, entry.epoch, first, [](int k) { return k % W; });
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
  leave(ws, entry);
}

}  // namespace

uint64_t one_shot_limit(const Workspace& ws) {
  return ws.layout.slot / (ws.world - 1) & ~uint64_t{127};
}

void all_reduce_one_shot(const Workspace& ws, Dtype dtype, const void* inp, void* out,
                         uint64_t bytes, const Shape& shape, gpu::Stream stream) {
  const uint64_t vectors = vectors_of(bytes);
  const int threads = shape.threads > 0 ? shape.threads : (vectors <= 2048 ? 128 : 512);
  int unroll = shape.unroll > 0 ? shape.unroll : 1;
  // A grid that is small enough to be resident as a whole; more work a thread before more blocks.
  const uint64_t most = shape.blocks > 0 ? shape.blocks : kMaxBlocks / 2;
  while (unroll < 8 && vectors > most * threads * unroll) unroll *= 2;
  const int blocks = static_cast<int>((vectors + threads * unroll - 1) / (threads * unroll));
  if (blocks > kMaxBlocks) {
    throw std::runtime_error("all_reduce_one_shot: the message needs more blocks than there are");
  }
  by_dtype(dtype, [&](auto type) {
    by_world(ws.world, [&](auto world) {
      using T = typename decltype(type)::type;
      constexpr int W = decltype(world)::value;
      const auto go = [&](auto number) {
        gpu::launch({blocks, threads, stream, shape.overlap}, "all_reduce_one_shot",
                    one_shot_kernel<T, W, decltype(number)::value>, ws, gpu::SpanOf<T>(inp, bytes),
                    gpu::SpanOf<T>(out, bytes), static_cast<uint32_t>(vectors));
      };
      if (unroll == 1) return go(Number<1>{});
      if (unroll == 2) return go(Number<2>{});
      if (unroll == 4) return go(Number<4>{});
      return go(Number<8>{});
    });
  });
}

}  // namespace collectives
