// Two-shot all-reduce and reduce-scatter. The tensor is cut into one slice a rank. Pushers send
// every slice to its owner; owners add their slice in rank order and push the sum to everybody;
// collectors copy the sums that arrive into the output. The three roles are blocks of one launch,
// in this order, and each waits only for roles before it, so they make progress even when few
// blocks are resident. A reduce-scatter is the same without the second half.
//
// In place is safe without further flags: a slice of the output is written when its sum arrives,
// which is after its owner had this rank's part of it.
#include "collectives/collectives.h"
#include "collectives/dispatch.h"
#include "collectives/lamport.h"
#include "prim/gpu_launch.h"

namespace collectives {
namespace {

// Where the slices lie in the tensor.
struct Slices {
  uint64_t bytes;   // of the whole tensor, or of one part
  uint64_t stride;  // 0: an even cut of one tensor; else parts at this distance

  template <typename T, int W>
  __device__ __forceinline__ gpu::SpanOf<T> of(const char* tensor, uint32_t rank) const {
    if (stride != 0) return {tensor + rank * stride, bytes};
    const uint64_t vectors = (bytes + gpu::kVectorBytes - 1) / gpu::kVectorBytes;
    const uint64_t begin = vectors * rank / W * gpu::kVectorBytes;
    const uint64_t end = vectors * (rank + 1) / W * gpu::kVectorBytes;
    return {tensor + begin, (end < bytes ? end : bytes) - begin};
  }
  template <int W>
  __host__ __device__ uint64_t longest() const {
    const uint64_t vectors = (bytes + gpu::kVectorBytes - 1) / gpu::kVectorBytes;
    return stride != 0 ? vectors : (vectors + W - 1) / W;
  }
};

template <typename T>
__device__ __forceinline__ uint64_t length(const gpu::SpanOf<T>& span) {
  return (span.bytes + gpu::kVectorBytes - 1) / gpu::kVectorBytes;
}

struct Roles {
  int pushers;
  int owners;
  int collectors;  // 0: a reduce-scatter
};

// A sender's area of a slot has two halves: raw slices, then sums.
__device__ __forceinline__ uint4* area(const Workspace& ws, uint32_t owner, uint64_t epoch,
                                       uint32_t sender, bool sums) {
  return reinterpret_cast<uint4*>(ws.slot_area(owner, sender) + ws.slot_of(epoch) +
                                  (sums ? ws.slot_stride / 2 : 0));
}

template <typename T, int W>
__device__ __forceinline__ void push(const Workspace& ws, const char* inp, const Slices& slices,
                                     uint64_t epoch, uint64_t first, uint64_t step) {
  for (uint64_t i = first; i < slices.longest<W>(); i += step) {
    uint4 values[W];
#pragma unroll
    for (int turn = 1; turn < W; ++turn) {
      const auto span = slices.of<T, W>(inp, (ws.rank + turn) % W);
      if (i < length<T>(span)) values[turn] = span.load(i);
    }
#pragma unroll
    for (int turn = 1; turn < W; ++turn) {
      const uint32_t peer = (ws.rank + turn) % W;
      if (i < length<T>(slices.of<T, W>(inp, peer))) {
        gpu::send_lamport(area(ws, peer, epoch, ws.rank, false) + i, values[turn]);
      }
    }
  }
}

template <typename T, int W>
__device__ __forceinline__ void own(const Workspace& ws, const char* inp, const gpu::SpanOf<T>& out,
                                    const Slices& slices, bool share, uint64_t epoch,
                                    uint64_t first, uint64_t step) {
  const auto mine = slices.of<T, W>(inp, ws.rank);
  char* ours = ws.base[ws.rank] + ws.layout.slot_offset(0) + ws.slot_of(epoch);
  gpu::Spin spin;
  for (uint64_t i = first; i < length<T>(mine); i += step) {
    const uint4 own_value = mine.load(i);
    char* raw = ours + i * gpu::kVectorBytes;
    uint4 peers[W - 1];
    receive_from_peers<W>(peers, raw, ws.slot_stride, ws, spin, epoch, i);
    const uint4 sum = rank_ordered_sum<T, W>(own_value, peers, ws.rank);
    if (share) {
#pragma unroll
      for (int turn = 1; turn < W; ++turn) {
        const uint32_t peer = (ws.rank + turn) % W;
        gpu::send_lamport(area(ws, peer, epoch, ws.rank, true) + i, sum);
      }
    }
    out.store(i, sum);
#pragma unroll
    for (int k = 0; k < W - 1; ++k) {
      gpu::clear_lamport(reinterpret_cast<uint4*>(raw + k * ws.slot_stride));
    }
  }
}

template <typename T, int W>
__device__ __forceinline__ void collect(const Workspace& ws, const char* out, const Slices& slices,
                                        uint64_t epoch, uint64_t first, uint64_t step) {
  gpu::Spin spin;
  for (uint64_t i = first; i < slices.longest<W>(); i += step) {
    uint4 values[W];
    uint4* slots[W];
#pragma unroll
    for (int r = 0; r < W; ++r) {
      const bool wanted = r != static_cast<int>(ws.rank) && i < length<T>(slices.of<T, W>(out, r));
      slots[r] = wanted ? area(ws, ws.rank, epoch, r, true) + i : nullptr;
    }
    receive_lamport(values, slots, ws, spin, epoch, i, [](int r) { return r; });
#pragma unroll
    for (int r = 0; r < W; ++r) {
      if (slots[r] != nullptr) {
        slices.of<T, W>(out, r).store(i, values[r]);
        gpu::clear_lamport(slots[r]);
      }
    }
  }
}

template <typename T, int W>
__global__ void __launch_bounds__(kMaxThreads)
    two_shot_kernel(const __grid_constant__ Workspace ws, const char* inp, char* out,
                    const Slices slices, const Roles roles) {
  Call<> call(ws);
  gpu::dependency_wait();
  gpu::launch_dependents();
  if (!call.enter()) return;
  const bool share = roles.collectors > 0;
  int block = blockIdx.x;
  const auto first = [&] { return static_cast<uint64_t>(block) * blockDim.x + threadIdx.x; };
  const auto step = [&](int blocks) { return static_cast<uint64_t>(blocks) * blockDim.x; };
  if (block < roles.pushers) {
    push<T, W>(ws, inp, slices, call.epoch, first(), step(roles.pushers));
    call.settle(ws);
  } else if ((block -= roles.pushers) < roles.owners) {
    const gpu::SpanOf<T> to =
        share ? slices.of<T, W>(out, ws.rank) : gpu::SpanOf<T>(out, slices.bytes);
    call.settle(ws);
    own<T, W>(ws, inp, to, slices, share, call.epoch, first(), step(roles.owners));
  } else {
    block -= roles.owners;
    call.settle(ws);
    collect<T, W>(ws, out, slices, call.epoch, first(), step(roles.collectors));
  }
  call.leave();
}

void launch_two_shot(const Workspace& ws, DType dtype, const void* inp, void* out,
                     const Slices& slices, bool share, const Shape& shape, gpu::Stream stream,
                     const char* name) {
  by_dtype(dtype, [&](auto type) {
    by_world(ws.world, [&](auto world) {
      using T = typename decltype(type)::type;
      constexpr int W = decltype(world)::value;
      const uint64_t longest = slices.longest<W>();
      const uint64_t needed = (longest + kMaxThreads - 1) / kMaxThreads;
      // Measured on four H200: up to 2 MB as many as make one wave, above twice as many.
      const int usual = share && longest * W > 128 * 1024 ? 88 : 44;
      Roles roles;
      roles.pushers = at_most(needed, shape.blocks > 0 ? shape.blocks : usual);
      roles.owners = at_most(needed, shape.other_blocks > 0 ? shape.other_blocks : usual);
      roles.collectors = share ? roles.owners : 0;
      const int blocks = roles.pushers + roles.owners + roles.collectors;
      if (blocks > kMaxBlocks) throw std::runtime_error("two_shot: the shape has too many blocks");
      gpu::launch<two_shot_kernel<T, W>>({blocks, kMaxThreads, stream, shape.overlap}, name, ws,
                                         static_cast<const char*>(inp), static_cast<char*>(out),
                                         slices, roles);
    });
  });
}

}  // namespace

uint64_t reduce_scatter_limit(const Workspace& ws) { return ws.slot_stride / 2; }

uint64_t two_shot_limit(const Workspace& ws) {
  // A slice is at most one vector longer than an even share.
  return (reduce_scatter_limit(ws) - 128) * ws.world;
}

void all_reduce_two_shot(const Workspace& ws, DType dtype, const void* inp, void* out,
                         uint64_t bytes, const Shape& shape, gpu::Stream stream) {
  if (vectors_of(bytes) < ws.world) {
    throw std::runtime_error("all_reduce_two_shot: at least 16 bytes a rank");
  }
  launch_two_shot(ws, dtype, inp, out, Slices{bytes, 0}, true, shape, stream,
                  "all_reduce_two_shot");
}

void reduce_scatter_push(const Workspace& ws, DType dtype, const void* inp, void* out,
                         uint64_t bytes, uint64_t stride, const Shape& shape, gpu::Stream stream) {
  launch_two_shot(ws, dtype, inp, out, Slices{bytes, stride}, false, shape, stream,
                  "reduce_scatter_push");
}

}  // namespace collectives
