// Streamed one-shot all-reduce between two ranks, for messages that fill the link: some blocks only
// push, others only poll and add, so that polls never queue behind stores that wait for the link.
// With two ranks it moves the same bytes as a two-shot and needs one trip instead of two.
//
// A message longer than a slot is cut into pieces that use the two slots in turn, within one launch.
// Piece q of a call that starts at epoch e may be pushed when the peer's slot is free:
//   q = 0   by the rule of workspace.h
//   q = 1   once the peer has entered this call (started), so that its last call has ended
//   q >= 2  once all of the peer's reducers are past piece q - 2 (consumed)
// and the call ends only when the peer is past its last piece but one, which is what the next call's
// q = 0 relies on.
#include "collectives/collectives.h"
#include "collectives/dispatch.h"
#include "collectives/marked.h"
#include "prim/gpu_launch.h"

namespace collectives {
namespace {

constexpr int kMaxThreads = 512;

struct Cut {
  uint32_t vectors;
  uint32_t chunks;            // of threads * U vectors, over the whole message
  uint32_t chunks_per_piece;  // pieces are whole chunks
  uint32_t pieces;
  uint32_t pushers;
  uint32_t reducers;
  bool in_place;
};

template <typename T, int U>
__device__ __forceinline__ void push(const Workspace& ws, const gpu::SpanOf<T>& inp, const Cut& cut,
                                     uint64_t epoch) {
  const uint32_t peer = 1 - ws.rank;
  Control& mine = ws.mine();
  gpu::Spin spin;
  uint32_t piece = 0;
  uint64_t count = 0;
  const auto wait_consumed = [&](uint64_t least) {
    for (uint32_t b = threadIdx.x; b < cut.reducers; b += blockDim.x) {
      gpu::wait_acquire(spin, ws.spin, &mine.consumed[b], least, peer, epoch, b);
    }
    __syncthreads();
  };
  for (uint32_t chunk = blockIdx.x; chunk < cut.chunks; chunk += cut.pushers) {
    if (chunk / cut.chunks_per_piece != piece) {
      piece = chunk / cut.chunks_per_piece;
      if (piece == 1) {
        if (threadIdx.x == 0) {
          gpu::wait_acquire(spin, ws.spin, &mine.started[peer], epoch + 1, peer, epoch, 0);
        }
        __syncthreads();
      } else {
        wait_consumed(epoch + piece - 1);
      }
    }
    uint4* area = ws.slot_area(peer, epoch + piece, ws.rank);
    const uint32_t first = chunk * blockDim.x * U + threadIdx.x;
    const uint32_t base = piece * cut.chunks_per_piece * blockDim.x * U;
    uint4 values[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const uint32_t i = first + u * blockDim.x;
      if (i < cut.vectors) values[u] = inp.load(i);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const uint32_t i = first + u * blockDim.x;
      if (i < cut.vectors) gpu::send_marked(area + i - base, values[u]);
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
  if (cut.pieces >= 2 && blockIdx.x == 0) wait_consumed(epoch + cut.pieces - 1);
}

template <typename T, int U>
__device__ __forceinline__ void reduce(const Workspace& ws, const gpu::SpanOf<T>& inp,
                                       const gpu::SpanOf<T>& out, const Cut& cut, uint64_t epoch) {
  const uint32_t peer = 1 - ws.rank;
  const uint32_t block = blockIdx.x - cut.pushers;
  Control& mine = ws.mine();
  gpu::Spin spin;
  uint32_t piece = 0;
  const auto pass = [&](uint32_t next) {  // everything before piece `next` is read and cleared
    __syncthreads();
    if (threadIdx.x == 0) {
      gpu::st_release_sys(&ws.control(peer).consumed[block], epoch + next);
    }
    piece = next;
  };
  for (uint32_t chunk = block; chunk < cut.chunks; chunk += cut.reducers) {
    if (chunk / cut.chunks_per_piece != piece) pass(chunk / cut.chunks_per_piece);
    const uint32_t first = chunk * blockDim.x * U + threadIdx.x;
    const uint32_t base = piece * cut.chunks_per_piece * blockDim.x * U;
    uint4* area = ws.slot_area(ws.rank, epoch + piece, peer);
    uint4 own[U];
    uint4 theirs[U];
    uint4* slots[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const uint32_t i = first + u * blockDim.x;
      slots[u] = i < cut.vectors ? area + i - base : nullptr;
      if (i < cut.vectors) own[u] = inp.load(i);
    }
    receive_marked(theirs, slots, ws, spin, epoch, first, [&](int) { return peer; });
    if (cut.in_place) {
      if (threadIdx.x == 0) {
        gpu::wait_acquire(spin, ws.spin, &mine.pushed[chunk % cut.pushers],
                          progress(epoch, chunk / cut.pushers + 1), ws.rank, epoch, chunk);
      }
      __syncthreads();
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const uint32_t i = first + u * blockDim.x;
      if (i >= cut.vectors) break;
      const uint4 pair[2] = {ws.rank == 0 ? own[u] : theirs[u], ws.rank == 0 ? theirs[u] : own[u]};
      out.store(i, rank_ordered_sum<T, 2>(pair));
      gpu::clear_marked(slots[u]);
    }
  }
  if (cut.pieces >= 2) pass(cut.pieces);
}

template <typename T, int U>
__global__ void __launch_bounds__(kMaxThreads)
    streamed_kernel(const __grid_constant__ Workspace ws, const gpu::SpanOf<T> inp,
                    const gpu::SpanOf<T> out, const Cut cut) {
  gpu::dependency_wait();
  gpu::launch_dependents();
  const Entry entry = enter(ws);
  if (!entry.ok) return;
  if (cut.pieces > 1 && blockIdx.x == 0 && threadIdx.x == 0) {
    gpu::st_release_sys(&ws.control(1 - ws.rank).started[ws.rank], entry.epoch + 1);
  }
  if (blockIdx.x < cut.pushers) {
    push<T, U>(ws, inp, cut, entry.epoch);
  } else {
    reduce<T, U>(ws, inp, out, cut, entry.epoch);
  }
  leave(ws, entry, cut.pieces);
}

}  // namespace

void all_reduce_streamed(const Workspace& ws, Dtype dtype, const void* inp, void* out,
                         uint64_t bytes, const Shape& shape, gpu::Stream stream) {
  if (ws.world != 2) throw std::runtime_error("all_reduce_streamed is for two ranks");
  const int threads = shape.threads > 0 ? shape.threads : kMaxThreads;
  const int unroll = shape.unroll > 0 ? shape.unroll : 4;
  const uint64_t chunk = static_cast<uint64_t>(threads) * unroll;
  const uint64_t vectors = vectors_of(bytes);
  if (vectors > (uint64_t{1} << 31)) {
    throw std::runtime_error("all_reduce_streamed: at most 32 GB a call");
  }
  uint64_t piece = shape.piece > 0 ? shape.piece : ws.layout.slot;
  if (piece > ws.layout.slot) piece = ws.layout.slot;
  Cut cut;
  cut.vectors = static_cast<uint32_t>(vectors);
  cut.chunks = static_cast<uint32_t>((vectors + chunk - 1) / chunk);
  cut.chunks_per_piece = at_most(piece / gpu::kVectorBytes / chunk, cut.chunks);
  cut.pieces = (cut.chunks + cut.chunks_per_piece - 1) / cut.chunks_per_piece;
  cut.pushers = at_most(cut.chunks, shape.blocks > 0 ? shape.blocks : 66);
  cut.reducers = at_most(cut.chunks, shape.other_blocks > 0 ? shape.other_blocks : 66);
  const char* from = static_cast<const char*>(inp);
  const char* to = static_cast<const char*>(out);
  cut.in_place = from < to + bytes && to < from + bytes;
  const int blocks = static_cast<int>(cut.pushers + cut.reducers);
  if (blocks > kMaxBlocks || chunk * gpu::kVectorBytes > ws.layout.slot) {
    throw std::runtime_error("all_reduce_streamed: the shape does not fit the workspace");
  }
  by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto go = [&](auto number) {
      gpu::launch({blocks, threads, stream, shape.overlap}, "all_reduce_streamed",
                  streamed_kernel<T, decltype(number)::value>, ws, gpu::SpanOf<T>(inp, bytes),
                  gpu::SpanOf<T>(out, bytes), cut);
    };
    if (unroll == 1) return go(Number<1>{});
    if (unroll == 2) return go(Number<2>{});
    return go(Number<4>{});
  });
}

}  // namespace collectives
