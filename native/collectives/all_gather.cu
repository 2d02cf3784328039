// All-gather, bit for bit. Small parts travel as LL packets (twice the bytes, one trip, no
// fence). Large ones are pushed as they are, chunk by chunk, behind a counter a pushing block;
// other blocks copy chunks that have arrived into the output.
#include <algorithm>

#include "collectives/collectives.h"
#include "collectives/dispatch.h"
#include "prim/gpu_launch.h"

namespace collectives {
namespace {

constexpr int kUnroll = 4;

// The parts of the output.
struct Parts {
  char* data;
  uint64_t bytes;
  uint64_t stride;
  template <typename Element>
  __device__ __forceinline__ gpu::Span<Element> of(uint32_t rank) const {
    return {data + rank * stride, bytes};
  }
};

template <typename Element, int W>
__global__ void __launch_bounds__(kMaxThreads)
    small_kernel(const __grid_constant__ Workspace ws, const gpu::Span<Element> inp,
                 const Parts out, uint32_t vectors) {
  Call<> call(ws);
  gpu::dependency_wait();
  gpu::launch_dependents();
  if (!call.enter()) return;
  const uint64_t offset = ws.layout.ll_offset(call.epoch & 1);
  const auto area = [&](uint32_t owner, uint32_t sender) {
    return reinterpret_cast<ulonglong2*>(ws.base[owner] + offset +
                                         Workspace::place(sender, owner) * ws.ll_stride);
  };
  const uint32_t tag = static_cast<uint32_t>(call.epoch) + 1;
  const uint32_t step = gridDim.x * blockDim.x;
  const uint32_t first = blockIdx.x * blockDim.x + threadIdx.x;
  for (uint32_t i = first; i < vectors; i += step) {
    const uint4 own = inp.load(i);
    out.of<Element>(ws.rank).store(i, own);
#pragma unroll
    for (int turn = 1; turn < W; ++turn) {
      ulonglong2* slot = area((ws.rank + turn) % W, ws.rank) + 2 * i;
      gpu::send_ll(slot, make_uint2(own.x, own.y), tag);
      gpu::send_ll(slot + 1, make_uint2(own.z, own.w), tag);
    }
  }
  call.settle(ws);
  gpu::Spin spin;
  for (uint32_t i = first; i < vectors; i += step) {
    ulonglong2 low[W];
    ulonglong2 high[W];
#pragma unroll
    for (int turn = 1; turn < W; ++turn) {
      const ulonglong2* slot = area(ws.rank, (ws.rank + turn) % W) + 2 * i;
      low[turn] = gpu::ld_relaxed_sys(slot);
      high[turn] = gpu::ld_relaxed_sys(slot + 1);
    }
#pragma unroll
    for (int turn = 1; turn < W; ++turn) {
      const uint32_t sender = (ws.rank + turn) % W;
      const ulonglong2* slot = area(ws.rank, sender) + 2 * i;
      spin.begin();
      while (!gpu::has_tag(low[turn], tag) || !gpu::has_tag(high[turn], tag)) {
        low[turn] = gpu::ld_relaxed_sys(slot);
        high[turn] = gpu::ld_relaxed_sys(slot + 1);
        if (spin.give_up(ws.spin, sender, call.epoch, i, tag, low[turn].x >> 32)) break;
      }
      const uint2 a = gpu::ll_data(low[turn]);
      const uint2 b = gpu::ll_data(high[turn]);
      out.of<Element>(sender).store(i, make_uint4(a.x, a.y, b.x, b.y));
    }
  }
  call.leave();
}

template <typename Element, int W>
__global__ void __launch_bounds__(kMaxThreads)
    bulk_kernel(const __grid_constant__ Workspace ws, const gpu::Span<Element> inp, const Parts out,
                uint32_t vectors, uint32_t chunks, uint32_t pushers, uint32_t collectors) {
  Call<> call(ws);
  gpu::dependency_wait();
  gpu::launch_dependents();
  if (!call.enter()) return;
  const uint64_t offset = ws.layout.bulk_offset(call.epoch & 1);
  const auto area = [&](uint32_t owner, uint32_t sender) {
    return reinterpret_cast<uint4*>(ws.base[owner] + offset +
                                    Workspace::place(sender, owner) * ws.bulk_stride);
  };
  call.settle(ws);
  if (blockIdx.x < pushers) {
    uint64_t count = 0;
    for (uint32_t chunk = blockIdx.x; chunk < chunks; chunk += pushers) {
      uint4 values[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const uint32_t i = (chunk * kUnroll + u) * blockDim.x + threadIdx.x;
        if (i < vectors) values[u] = inp.load(i);
      }
#pragma unroll
      for (int turn = 1; turn < W; ++turn) {
        uint4* to = area((ws.rank + turn) % W, ws.rank);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const uint32_t i = (chunk * kUnroll + u) * blockDim.x + threadIdx.x;
          if (i < vectors) gpu::st_relaxed_sys(to + i, values[u]);
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const uint32_t i = (chunk * kUnroll + u) * blockDim.x + threadIdx.x;
        if (i < vectors) out.of<Element>(ws.rank).store(i, values[u]);
      }
      gpu::sync_before_release();
      ++count;
      if (threadIdx.x < W && threadIdx.x != ws.rank) {
        gpu::st_release_sys(&ws.control(threadIdx.x).arrived[ws.rank][blockIdx.x],
                            progress(call.epoch, count));
      }
    }
  } else {
    gpu::Spin spin;
    for (uint32_t chunk = blockIdx.x - pushers; chunk < chunks; chunk += collectors) {
      for (int turn = 1; turn < W; ++turn) {
        const uint32_t sender = (ws.rank + turn) % W;
        if (threadIdx.x == 0) {
          gpu::wait_acquire(spin, ws.spin, &ws.mine().arrived[sender][chunk % pushers],
                            progress(call.epoch, chunk / pushers + 1), sender, call.epoch, chunk);
        }
        __syncthreads();
        const uint4* from = area(ws.rank, sender);
        uint4 values[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const uint32_t i = (chunk * kUnroll + u) * blockDim.x + threadIdx.x;
          if (i < vectors) values[u] = gpu::ld_relaxed_sys(from + i);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const uint32_t i = (chunk * kUnroll + u) * blockDim.x + threadIdx.x;
          if (i < vectors) out.of<Element>(sender).store(i, values[u]);
        }
      }
    }
  }
  call.leave();
}

// Copies move words where everything is whole words, else bytes.
template <typename Body>
void by_element(const void* inp, const void* out, uint64_t bytes, uint64_t stride, Body body) {
  const uint64_t all =
      reinterpret_cast<uintptr_t>(inp) | reinterpret_cast<uintptr_t>(out) | bytes | stride;
  if (all % 4 == 0) return body(uint32_t{});
  return body(uint8_t{});
}

}  // namespace

uint64_t all_gather_small_limit(const Workspace& ws) { return ws.ll_stride / 2; }

uint64_t all_gather_limit(const Workspace& ws) { return ws.bulk_stride; }

void all_gather_small(const Workspace& ws, const void* inp, void* out, uint64_t bytes,
                      uint64_t stride, const Shape& shape, gpu::Stream stream) {
  const uint64_t vectors = vectors_of(bytes);
  constexpr int threads = std::min(256, kMaxThreads);
  const int blocks =
      at_most((vectors + threads - 1) / threads, shape.blocks > 0 ? shape.blocks : 132);
  by_element(inp, out, bytes, stride, [&](auto element) {
    by_world(ws.world, [&](auto world) {
      using Element = decltype(element);
      gpu::launch<small_kernel<Element, decltype(world)::value>>(
          {blocks, threads, stream, shape.overlap}, "all_gather_small", ws,
          gpu::Span<Element>(inp, bytes), Parts{static_cast<char*>(out), bytes, stride},
          static_cast<uint32_t>(vectors));
    });
  });
}

void all_gather_bulk(const Workspace& ws, const void* inp, void* out, uint64_t bytes,
                     uint64_t stride, const Shape& shape, gpu::Stream stream) {
  const uint64_t vectors = vectors_of(bytes);
  constexpr uint64_t chunk = kMaxThreads * kUnroll;
  const uint64_t chunks = (vectors + chunk - 1) / chunk;
  const int pushers = at_most(chunks, shape.blocks > 0 ? shape.blocks : 66);
  const int collectors = at_most(chunks, shape.other_blocks > 0 ? shape.other_blocks : 66);
  by_element(inp, out, bytes, stride, [&](auto element) {
    by_world(ws.world, [&](auto world) {
      using Element = decltype(element);
      gpu::launch<bulk_kernel<Element, decltype(world)::value>>(
          {pushers + collectors, kMaxThreads, stream, shape.overlap}, "all_gather_bulk", ws,
          gpu::Span<Element>(inp, bytes), Parts{static_cast<char*>(out), bytes, stride},
          static_cast<uint32_t>(vectors), static_cast<uint32_t>(chunks),
          static_cast<uint32_t>(pushers), static_cast<uint32_t>(collectors));
    });
  });
}

}  // namespace collectives
