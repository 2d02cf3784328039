// Streamed one-shot all-reduce between two ranks, for messages that fill the link: some blocks only
// push, others only poll and add, so that polls never queue behind stores that wait for the link.
// With two ranks it moves the same bytes as a two-shot and needs one trip instead of two.
//
// A message longer than a slot is cut into pieces that use the two slots in turn, within one
// launch. Piece q of a call that starts at epoch e may be pushed when the peer's slot is free:
//   q = 0   by the rule of workspace.h
//   q = 1   once the peer has entered this call (started), so that its last call has ended
//   q >= 2  once all of the peer's reducers are past piece q - 2 (consumed)
// and the call ends only when the peer is past its last piece but one, which is what the next
// call's q = 0 relies on. Within a rank a place in a slot belongs to one reducer block for the
// whole call: it never looks for piece q where another block has yet to clear piece q - 2.
#include "collectives/collectives.h"
#include "collectives/dispatch.h"
#include "collectives/lamport.h"
#include "prim/gpu_launch.h"

namespace collectives {
namespace {

constexpr int kUnroll = 2;  // vectors a thread has in flight

// The cut into pieces of chunks of blockDim * kUnroll vectors. Of every piece pusher p sends the
// chunks p, p + pushers, ..., and reducer r adds r, r + reducers, ...
struct Cut {
  uint32_t vectors;
  uint32_t pieces;
  uint32_t piece_chunks;  // in every piece but the last
  uint32_t last_chunks;
  uint32_t pushers;
  uint32_t reducers;
  bool in_place;

  __device__ __forceinline__ uint32_t chunks_in(uint32_t piece) const {
    return piece + 1 == pieces ? last_chunks : piece_chunks;
  }
};

template <typename T, bool kWhole>
__device__ __forceinline__ void push(const Workspace& ws, Call<>& call,
                                     const gpu::SpanOf<T, kWhole>& inp, const Cut& cut) {
  const uint32_t peer = 1 - ws.rank;
  const uint64_t epoch = call.epoch;
  Control& mine = ws.mine();
  gpu::Spin spin;
  uint64_t count = 0;
  const auto wait_consumed = [&](uint64_t least) {
    for (uint32_t b = threadIdx.x; b < cut.reducers; b += blockDim.x) {
      gpu::wait_acquire(spin, ws.spin, &mine.consumed[b], least, peer, epoch, b);
    }
    __syncthreads();
  };
  for (uint32_t piece = 0; piece < cut.pieces; ++piece) {
    if (piece == 1) {
      if (threadIdx.x == 0) {
        gpu::wait_acquire(spin, ws.spin, &mine.started[peer], epoch + 1, peer, epoch, 0);
      }
      __syncthreads();
    } else if (piece >= 2) {
      wait_consumed(epoch + piece - 1);
    }
    uint4* area = reinterpret_cast<uint4*>(ws.slot_area(peer, ws.rank) + ws.slot_of(epoch + piece));
    const uint32_t base = piece * cut.piece_chunks * blockDim.x * kUnroll;
    const uint32_t chunks = cut.chunks_in(piece);
    for (uint32_t chunk = blockIdx.x; chunk < chunks; chunk += cut.pushers) {
      const uint32_t first = chunk * blockDim.x * kUnroll + threadIdx.x;
      uint4 values[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const uint32_t i = first + u * blockDim.x;
        if (base + i < cut.vectors) values[u] = inp.load(base + i);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const uint32_t i = first + u * blockDim.x;
        if (base + i < cut.vectors) {
          gpu::send_lamport(area + i, values[u]);
        }
      }
      if (cut.in_place) {
        // The stores above needed the loaded values, so after the barrier the chunk has been read.
        __syncthreads();
        ++count;
        if (threadIdx.x == 0) {
          gpu::st_relaxed_sys(&mine.pushed[blockIdx.x], progress(epoch, count));
        }
      }
    }
    if (piece == 0) call.settle(ws);
  }
  if (cut.pieces >= 2 && blockIdx.x == 0) wait_consumed(epoch + cut.pieces - 1);
}

template <typename T, bool kWhole>
__device__ __forceinline__ void reduce(const Workspace& ws, Call<>& call,
                                       const gpu::SpanOf<T, kWhole>& inp,
                                       const gpu::SpanOf<T, kWhole>& out, const Cut& cut) {
  const uint32_t peer = 1 - ws.rank;
  const uint32_t block = blockIdx.x - cut.pushers;
  const uint64_t epoch = call.epoch;
  Control& mine = ws.mine();
  gpu::Spin spin;
  call.settle(ws);
  for (uint32_t piece = 0; piece < cut.pieces; ++piece) {
    uint4* area = reinterpret_cast<uint4*>(ws.slot_area(ws.rank, peer) + ws.slot_of(epoch + piece));
    const uint32_t base = piece * cut.piece_chunks * blockDim.x * kUnroll;
    const uint32_t chunks = cut.chunks_in(piece);
    for (uint32_t chunk = block; chunk < chunks; chunk += cut.reducers) {
      const uint32_t first = chunk * blockDim.x * kUnroll + threadIdx.x;
      uint4 own[kUnroll];
      uint4 theirs[kUnroll];
      uint4* slots[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const uint32_t i = first + u * blockDim.x;
        const bool inside = base + i < cut.vectors;
        slots[u] = inside ? area + i : nullptr;
        if (inside) own[u] = inp.load(base + i);
      }
      wait_for_warp(slots[kUnroll - 1], ws, spin, epoch, first, peer);
      receive_lamport(theirs, slots, ws, spin, epoch, first, [&](int) { return peer; });
      if (cut.in_place) {
        if (threadIdx.x == 0) {
          const uint32_t pusher = chunk % cut.pushers;
          const uint32_t a_piece = (cut.piece_chunks - pusher + cut.pushers - 1) / cut.pushers;
          gpu::wait_acquire(spin, ws.spin, &mine.pushed[pusher],
                            progress(epoch, piece * a_piece + chunk / cut.pushers + 1), ws.rank,
                            epoch, chunk);
        }
        __syncthreads();
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (slots[u] != nullptr) {
          const uint4 peer_value[1] = {theirs[u]};
          out.store(base + first + u * blockDim.x,
                    rank_ordered_sum<T, 2>(own[u], peer_value, ws.rank));
          gpu::clear_lamport(slots[u]);
        }
      }
    }
    if (cut.pieces >= 2) {
      gpu::sync_before_release();  // the block has read and cleared its places of this piece
      if (threadIdx.x == 0) {
        gpu::st_release_sys(&ws.control(peer).consumed[block], epoch + piece + 1);
      }
    }
  }
}

template <typename T, bool kWhole>
__global__ void __launch_bounds__(kMaxThreads)
    streamed_kernel(const __grid_constant__ Workspace ws, const gpu::SpanOf<T, kWhole> inp,
                    const gpu::SpanOf<T, kWhole> out, const Cut cut) {
  Call<> call(ws);
  gpu::dependency_wait();
  gpu::launch_dependents();
  if (!call.enter()) return;
  if (cut.pieces > 1 && blockIdx.x == 0 && threadIdx.x == 0) {
    gpu::st_release_sys(&ws.control(1 - ws.rank).started[ws.rank], call.epoch + 1);
  }
  if (blockIdx.x < cut.pushers) {
    push<T, kWhole>(ws, call, inp, cut);
  } else {
    reduce<T, kWhole>(ws, call, inp, out, cut);
  }
  call.leave(cut.pieces);
}

}  // namespace

void all_reduce_streamed(const Workspace& ws, DType dtype, const void* inp, void* out,
                         uint64_t bytes, const Shape& shape, gpu::Stream stream) {
  if (ws.world != 2) throw std::runtime_error("all_reduce_streamed is for two ranks");
  constexpr uint64_t chunk = kMaxThreads * kUnroll;  // vectors
  const uint64_t vectors = vectors_of(bytes);
  if (vectors > (uint64_t{1} << 31)) {
    throw std::runtime_error("all_reduce_streamed: at most 32 GB a call");
  }
  const uint64_t chunks = (vectors + chunk - 1) / chunk;
  Cut cut;
  cut.vectors = static_cast<uint32_t>(vectors);
  cut.piece_chunks = at_most(ws.layout.slot / 2 / gpu::kVectorBytes / chunk, chunks);
  cut.pieces = static_cast<uint32_t>((chunks + cut.piece_chunks - 1) / cut.piece_chunks);
  cut.last_chunks = static_cast<uint32_t>(chunks) - (cut.pieces - 1) * cut.piece_chunks;
  cut.pushers = at_most(cut.piece_chunks, shape.blocks > 0 ? shape.blocks : 32);
  cut.reducers = at_most(cut.piece_chunks, shape.other_blocks > 0 ? shape.other_blocks : 100);
  const char* from = static_cast<const char*>(inp);
  const char* to = static_cast<const char*>(out);
  cut.in_place = from < to + bytes && to < from + bytes;
  const int blocks = static_cast<int>(cut.pushers + cut.reducers);
  if (blocks > kMaxBlocks || chunk * gpu::kVectorBytes > ws.layout.slot) {
    throw std::runtime_error("all_reduce_streamed: the shape does not fit the workspace");
  }
  by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto go = [&](auto whole) {
      constexpr bool kWhole = decltype(whole)::value;
      gpu::launch<streamed_kernel<T, kWhole>>(
          {blocks, kMaxThreads, stream, shape.overlap}, "all_reduce_streamed", ws,
          gpu::SpanOf<T, kWhole>(inp, bytes), gpu::SpanOf<T, kWhole>(out, bytes), cut);
    };
    const bool whole =
        gpu::SpanOf<T>(inp, bytes).all_whole() && gpu::SpanOf<T>(out, bytes).all_whole();
    whole ? go(std::true_type{}) : go(std::false_type{});
  });
}

}  // namespace collectives
