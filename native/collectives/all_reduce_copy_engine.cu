// All-reduce of two ranks by the copy engines, for large messages: peer copies move the data,
// faster than stores of the multiprocessors and without them, and one small kernel adds what has
// landed. The message is cut into chunks, which go round a ring in the peer's bulk region; two copy
// streams ("lanes") take them in turn, so that the link is busy while one lane signals and waits.
//
//   main stream   [begin] --------------- [add, the whole call long] ------------ join
//   lane k          \-- [turn 0][copy][turn 1][copy] ... [turn n] ---------------/
//
// turn j of a lane announces that its copy j-1 has landed and waits until the ring has room for
// copy j. These are kernels, and not stream memory operations, because their waits have a deadline
// and their values follow the epoch in device memory, so that a graph can be replayed.
//
// | word      | owner    | writer                  | meaning of the value                        |
// |-----------|----------|-------------------------|---------------------------------------------|
// | ready     | receiver | peer's begin            | e+1: the peer has entered call e            |
// | copy_epoch| rank     | its own begin           | e of the call under way                     |
// | landed[k] | receiver | peer's turns of lane k  | (e, copies of lane k that have landed here) |
// | sent[k]   | rank     | its turns of lane k     | (e, copies of lane k that have left inp)    |
// | taken[b]  | sender   | peer's adder block b    | (e, chunks that it has read)                |
//
// The call ends when the peer has taken everything, so that the next call may use the bulk region.
#include "collectives/collectives.h"
#include "collectives/dispatch.h"
#include "collectives/marked.h"
#include "prim/gpu_launch.h"

namespace collectives {
namespace {

constexpr int kThreads = 512;
constexpr int kTurnThreads = kCopyAdders;

struct Ring {
  uint64_t chunk;   // bytes, a multiple of 128
  uint32_t slots;   // a multiple of kCopyLanes
  uint32_t chunks;  // of the whole message
  uint32_t adders;
};

__global__ void begin_kernel(const __grid_constant__ Workspace ws) {
  Control& mine = ws.mine();
  const uint64_t epoch = gpu::ld_relaxed_sys(&mine.words[0].state) >> 1;
  const uint32_t peer = 1 - ws.rank;
  gpu::st_relaxed_sys(&mine.copy_epoch, epoch);
  gpu::st_release_sys(&ws.control(peer).ready, epoch + 1);
}

// Before copy `turn` of `lane`, which carries chunk turn * kCopyLanes + lane; `end`: there is none.
__global__ void turn_kernel(const __grid_constant__ Workspace ws, const Ring ring, uint32_t lane,
                            uint32_t turn, bool end) {
  Control& mine = ws.mine();
  const uint32_t peer = 1 - ws.rank;
  const uint64_t epoch = gpu::ld_relaxed_sys(&mine.copy_epoch);
  if (threadIdx.x == 0 && turn > 0) {
    gpu::st_release_sys(&ws.control(peer).landed[lane], progress(epoch, turn));
    gpu::st_release_sys(&mine.sent[lane], progress(epoch, turn));
  }
  gpu::Spin spin;
  if (turn == 0 && threadIdx.x == 0) {
    gpu::wait_acquire(spin, ws.spin, &mine.ready, epoch + 1, peer, epoch, lane);
  }
  const uint32_t chunk = turn * kCopyLanes + lane;
  const uint32_t taken = end ? ring.chunks : (chunk < ring.slots ? 0 : chunk - ring.slots + 1);
  if (taken > 0 && threadIdx.x < ring.adders) {
    gpu::wait_acquire(spin, ws.spin, &mine.taken[threadIdx.x], progress(epoch, taken), peer, epoch,
                      threadIdx.x);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    add_kernel(const __grid_constant__ Workspace ws, const gpu::SpanOf<T> inp,
               const gpu::SpanOf<T> out, const Ring ring) {
  constexpr int kUnroll = 4;
  Call call(ws);
  if (!call.enter()) return;
  call.settle(ws);
  Control& mine = ws.mine();
  const uint32_t peer = 1 - ws.rank;
  const uint64_t all = (inp.bytes + gpu::kVectorBytes - 1) / gpu::kVectorBytes;
  const uint64_t per_chunk = ring.chunk / gpu::kVectorBytes;
  const char* bulk = ws.base[ws.rank] + ws.layout.bulk_offset(0);
  gpu::Spin spin;
  for (uint32_t chunk = 0; chunk < ring.chunks; ++chunk) {
    if (threadIdx.x < 2) {
      const uint32_t lane = chunk % kCopyLanes;
      const uint64_t least = progress(call.epoch, chunk / kCopyLanes + 1);
      // In place, the chunk must also have left this rank's tensor.
      const uint64_t* counter = threadIdx.x == 0 ? &mine.landed[lane] : &mine.sent[lane];
      gpu::wait_acquire(spin, ws.spin, counter, least, threadIdx.x == 0 ? peer : ws.rank,
                        call.epoch, chunk);
    }
    __syncthreads();
    const auto* landed = reinterpret_cast<const uint4*>(bulk + chunk % ring.slots * ring.chunk);
    const uint64_t base = chunk * per_chunk;
    const uint64_t count = all - base < per_chunk ? all - base : per_chunk;
    const uint64_t step = gridDim.x * blockDim.x;
    for (uint64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step * kUnroll) {
      uint4 own[kUnroll];
      uint4 theirs[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (i + u * step < count) own[u] = inp.load(base + i + u * step);
        if (i + u * step < count) theirs[u] = gpu::ld_relaxed_sys(landed + i + u * step);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (i + u * step >= count) break;
        const uint4 peer_value[1] = {theirs[u]};
        out.store(base + i + u * step, rank_ordered_sum<T, 2>(own[u], peer_value, ws.rank));
      }
    }
    gpu::sync_before_release();
    if (threadIdx.x == 0) {
      gpu::st_release_sys(&ws.control(peer).taken[blockIdx.x], progress(call.epoch, chunk + 1));
    }
  }
  call.leave();
}

}  // namespace

void load_copy_engine_kernels() {
  gpu::preload<begin_kernel>();
  gpu::preload<turn_kernel>();
  gpu::preload<add_kernel<float>>();
  gpu::preload<add_kernel<gpu::Half>>();
  gpu::preload<add_kernel<gpu::BFloat16>>();
}

void all_reduce_copy_engine(const Workspace& ws, Dtype dtype, const void* inp, void* out,
                            uint64_t bytes, const Shape& shape, const CopyLanes& lanes,
                            gpu::Stream stream) {
  if (ws.world != 2) throw std::runtime_error("all_reduce_copy_engine is for two ranks");
  const uint32_t peer = 1 - ws.rank;
  const uint64_t ring_bytes = 2 * ws.layout.bulk;
  uint64_t chunk = shape.piece > 0 ? shape.piece : ring_bytes / 4;
  if (chunk > ring_bytes / kCopyLanes) chunk = ring_bytes / kCopyLanes;
  Ring ring;
  ring.chunk = chunk & ~uint64_t{127};
  ring.slots = static_cast<uint32_t>(ring_bytes / ring.chunk / kCopyLanes * kCopyLanes);
  ring.chunks = static_cast<uint32_t>((bytes + ring.chunk - 1) / ring.chunk);
  ring.adders = at_most(shape.other_blocks > 0 ? shape.other_blocks : 32, kCopyAdders);
  begin_kernel<<<1, 1, 0, stream>>>(ws);
  GPU_CHECK_LAUNCH("all_reduce_copy_engine: begin");
  GPU_CHECK(GPU_NAME(EventRecord)(lanes.begin, stream));
  for (uint32_t lane = 0; lane < kCopyLanes; ++lane) {
    GPU_CHECK(GPU_NAME(StreamWaitEvent)(lanes.stream[lane], lanes.begin, 0));
  }
  by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    add_kernel<T><<<static_cast<int>(ring.adders), kThreads, 0, stream>>>(
        ws, gpu::SpanOf<T>(inp, bytes), gpu::SpanOf<T>(out, bytes), ring);
    GPU_CHECK_LAUNCH("all_reduce_copy_engine: add");
  });
  char* remote = ws.base[peer] + ws.layout.bulk_offset(0);
  for (uint32_t c = 0; c < ring.chunks; ++c) {
    const uint32_t lane = c % kCopyLanes;
    turn_kernel<<<1, kTurnThreads, 0, lanes.stream[lane]>>>(ws, ring, lane, c / kCopyLanes, false);
    GPU_CHECK_LAUNCH("all_reduce_copy_engine: turn");
    const uint64_t begin = c * ring.chunk;
    const uint64_t size = bytes - begin < ring.chunk ? bytes - begin : ring.chunk;
    GPU_CHECK(GPU_NAME(MemcpyAsync)(remote + c % ring.slots * ring.chunk,
                                    static_cast<const char*>(inp) + begin, size,
                                    GPU_NAME(MemcpyDeviceToDevice), lanes.stream[lane]));
  }
  for (uint32_t lane = 0; lane < kCopyLanes; ++lane) {
    const uint32_t turns = (ring.chunks + kCopyLanes - 1 - lane) / kCopyLanes;
    turn_kernel<<<1, kTurnThreads, 0, lanes.stream[lane]>>>(ws, ring, lane, turns, true);
    GPU_CHECK_LAUNCH("all_reduce_copy_engine: last turn");
    GPU_CHECK(GPU_NAME(EventRecord)(lanes.done[lane], lanes.stream[lane]));
    GPU_CHECK(GPU_NAME(StreamWaitEvent)(stream, lanes.done[lane], 0));
  }
}

}  // namespace collectives
