// The kernel of the quantized two-shot all-reduce, see quick_all_reduce.h.
//
// Work is cut into messages: number k of an owner is the k-th group of 4 vectors a lane among its
// rows. A thread does the numbers k, k + threads of the grid, ... in all three steps, so in place
// needs no further care, and the steps of different numbers overlap: while it reads the parts of
// one, those of the next are on their way. It waits for single messages and meets no other thread.
#include "collectives/quick_all_reduce.h"

#include <algorithm>

#include "collectives/quick_wire.h"
#include "prim/gpu_launch.h"
#include "prim/gpu_spin.h"

namespace quick {
namespace {

template <int N>
struct Number {
  static constexpr int value = N;
};

struct Work {
  uint32_t messages;  // of each owner
  uint32_t room;      // messages of a part of an area
  uint32_t ahead;
};

template <Codec C, Half H, int W>
class Kernel {
 public:
  using Sent = Message<C, H>;
  using Span = gpu::SpanOf<typename Element<H>::type>;

  __device__ __forceinline__ Kernel(const View& view, const Span& inp, const Span& out,
                                    const Work& work, uint64_t epoch)
      : view_(view), inp_(inp), out_(out), work_(work), epoch_(epoch) {}

  // Sends the peers their rows of message k.
  __device__ __forceinline__ void scatter(uint32_t k) {
#pragma unroll 1
    for (uint32_t turn = 1; turn < W; ++turn) {
      const uint32_t peer = (view_.rank + turn) % W;  // not everybody to the same peer at once
      Sent sent;
      sent.encode(load(peer, k));
      sent.seal();
      sent.store(part(peer, view_.rank, 0), k, work_.room);
    }
  }

  // Sums this rank's rows of message k, keeps them, and sends them to the peers.
  __device__ __forceinline__ void reduce(uint32_t k) {
    const Vectors own = load(view_.rank, k);
    Floats<H> sum[kQuad] = {minus_zeros(), minus_zeros(), minus_zeros(), minus_zeros()};
#pragma unroll 1
    for (uint32_t rank = 0; rank < W; ++rank) {
      if (rank == view_.rank) {
#pragma unroll
        for (int s = 0; s < kQuad; ++s) gpu::accumulate(sum[s], Floats<H>(own.of[s]));
      } else {
        receive(rank, k, 0).decode(
            [&](int s, const Floats<H>& values) { gpu::accumulate(sum[s], values); });
      }
    }
    Sent sent;
    sent.encode_sum(sum);
    store(view_.rank, k, sent);
    sent.seal();
#pragma unroll 1
    for (uint32_t turn = 1; turn < W; ++turn) {
      const uint32_t peer = (view_.rank + turn) % W;
      sent.store(part(peer, view_.rank, 1), k, work_.room);
    }
  }

  // Decodes the other owners' sums of message k.
  __device__ __forceinline__ void gather(uint32_t k) {
#pragma unroll 1
    for (uint32_t turn = 1; turn < W; ++turn) {
      const uint32_t peer = (view_.rank + turn) % W;
      store(peer, k, receive(peer, k, 1));
    }
  }

 private:
  // What x + it leaves as it is, of all x.
  static __device__ __forceinline__ Floats<H> minus_zeros() {
    constexpr uint32_t kPair = 0x80008000u;
    return Floats<H>(make_uint4(kPair, kPair, kPair, kPair));
  }

  // Where vector 0 of this lane is; the next ones are 32 further on each.
  static __device__ __forceinline__ uint64_t first_vector(uint32_t owner, uint32_t k) {
    constexpr uint32_t kOfTile = messages_of_tile(W);
    const uint32_t within = k % kOfTile;
    return uint64_t{k / kOfTile} * kTileVectors + (owner * kOfTile + (within & ~31u)) * kQuad +
           within % 32;
  }

  __device__ __forceinline__ Vectors load(uint32_t owner, uint32_t k) const {
    const uint64_t first = first_vector(owner, k);
    Vectors v;
    if (inp_.whole(first + 32 * (kQuad - 1))) {
#pragma unroll
      for (int s = 0; s < kQuad; ++s) {
        v.of[s] = reinterpret_cast<const uint4*>(inp_.data)[first + 32 * s];
      }
    } else {
#pragma unroll
      for (int s = 0; s < kQuad; ++s) v.of[s] = inp_.load(first + 32 * s);
    }
    return v;
  }

  __device__ __forceinline__ void store(uint32_t owner, uint32_t k, const Sent& sums) const {
    const uint64_t first = first_vector(owner, k);
    const bool whole = out_.whole(first + 32 * (kQuad - 1));
    sums.decode([&](int s, const Floats<H>& values) {
      if (whole) {
        reinterpret_cast<uint4*>(out_.data)[first + 32 * s] = values.rounded();
      } else {
        out_.store(first + 32 * s, values.rounded());
      }
    });
  }

  // `sender`'s part of an area of `owner`.
  __device__ __forceinline__ char* part(uint32_t owner, uint32_t sender, int shot) const {
    const uint32_t among = sender < owner ? sender : sender - 1;
    constexpr uint32_t kBytes = part_bytes(C, W) / messages_of_tile(W);
    return view_.area(owner, epoch_, shot) + uint64_t{among} * work_.room * kBytes;
  }

  __device__ __forceinline__ Sent receive(uint32_t sender, uint32_t k, int shot) {
    char* from = part(view_.rank, sender, shot);
    Sent sent;
    spin_.begin();
    for (;;) {
      sent.load(from, k, work_.room);
      if (sent.arrived() || spin_.give_up(view_.spin, sender, epoch_, k, 0, 0)) break;
    }
    Sent::clear(from, k, work_.room);
    sent.unseal();
    return sent;
  }

  const View& view_;
  const Span& inp_;
  const Span& out_;
  const Work& work_;
  const uint64_t epoch_;
  gpu::Spin spin_;
};

// Another call is in flight, on another stream: they use the same places.
__device__ __forceinline__ void mark_busy(const View& view, StateWord& word, uint64_t epoch) {
  const uint64_t before = gpu::fetch_or_relaxed_gpu(&word.state, 1);
  if ((before & 1) == 0) return;
  gpu::report_once(view.spin, gpu::kSpinBusy, view.rank, epoch, blockIdx.x, epoch * 2, before, 0);
}

template <Codec C, Half H, int W>
__global__ void __launch_bounds__(kMaxThreads, 2)
    quick_all_reduce_kernel(const __grid_constant__ View view,
                            const __grid_constant__ gpu::SpanOf<typename Element<H>::type> inp,
                            const __grid_constant__ gpu::SpanOf<typename Element<H>::type> out,
                            const __grid_constant__ Work work) {
  gpu::dependency_wait();
  gpu::launch_dependents();
  Control& control = view.control(view.rank);
  const auto seen =
      gpu::ld_relaxed_sys(reinterpret_cast<const ulonglong2*>(&control.words[blockIdx.x]));
  const uint64_t epoch = seen.x >> 1;
  if (seen.y != 0) return;
  Kernel<C, H, W> kernel(view, inp, out, work, epoch);
  const uint32_t stride = gridDim.x * blockDim.x;
  const uint32_t first = blockIdx.x * blockDim.x + threadIdx.x;
  // Whole warps enter and leave the steps together: the lanes of a quad exchange values.
  const uint32_t lag = work.ahead * stride;
  for (uint32_t k = first; k < work.messages + 2 * lag; k += stride) {
    if (k < work.messages) kernel.scatter(k);
    if (k == threadIdx.x + blockIdx.x * blockDim.x && threadIdx.x == 0) {
      mark_busy(view, control.words[blockIdx.x], epoch);
    }
    if (k - lag < work.messages) kernel.reduce(k - lag);
    if (k - 2 * lag < work.messages) kernel.gather(k - 2 * lag);
  }
  __syncthreads();  // all threads have read the state
  // The next call may have more blocks: block b keeps the words b, b + G, ... at the same epoch,
  // and no block reads a word that another block of its call writes.
  for (uint32_t b = blockIdx.x + threadIdx.x * gridDim.x; b < kMaxBlocks;
       b += blockDim.x * gridDim.x) {
    gpu::st_relaxed_sys(&control.words[b].state, (epoch + 1) * 2);
  }
}

template <typename Body>
void by_world(uint32_t world, Body body) {
  if (world == 2) return body(Number<2>{});
  if (world == 4) return body(Number<4>{});
  if (world == 8) return body(Number<8>{});
  throw Error(Failure::kArgument,
              "the world size is " + std::to_string(world) + "; it must be 2, 4 or 8");
}

template <typename Body>
void by_codec(Codec codec, Body body) {
  switch (codec) {
    case Codec::kFp:
      return body(std::integral_constant<Codec, Codec::kFp>{});
    case Codec::kQ8:
      return body(std::integral_constant<Codec, Codec::kQ8>{});
    case Codec::kQ6:
      return body(std::integral_constant<Codec, Codec::kQ6>{});
    case Codec::kQ4:
      return body(std::integral_constant<Codec, Codec::kQ4>{});
  }
  throw Error(Failure::kArgument, "the codec is not FP, Q8, Q6 or Q4");
}

}  // namespace

uint64_t tiles_at_once(const View& view, uint32_t world, Codec codec) {
  return view.area_bytes / (part_bytes(codec, world) * (world - 1));
}

void all_reduce(const View& view, uint32_t world, Codec codec, Half half, const void* inp,
                void* out, uint64_t bytes, const Launch& launch, gpu::Stream stream) {
  const auto tiles = static_cast<uint32_t>((bytes + kTileBytes - 1) / kTileBytes);
  const uint32_t of_tile = messages_of_tile(world);
  const Work work{tiles * of_tile,
                  static_cast<uint32_t>(tiles_at_once(view, world, codec)) * of_tile,
                  static_cast<uint32_t>(launch.ahead)};
  const auto threads = static_cast<uint32_t>(launch.threads);
  const int blocks =
      std::min(static_cast<int>((work.messages + threads - 1) / threads), launch.blocks);
  by_world(world, [&](auto number) {
    by_codec(codec, [&](auto chosen) {
      const auto go = [&](auto dtype) {
        constexpr int W = decltype(number)::value;
        constexpr Codec C = decltype(chosen)::value;
        constexpr Half H = decltype(dtype)::value;
        using Span = gpu::SpanOf<typename Element<H>::type>;
        gpu::launch<quick_all_reduce_kernel<C, H, W>>(
            {blocks, launch.threads, stream, launch.overlap}, "quick_all_reduce", view,
            Span(inp, bytes), Span(out, bytes), work);
      };
      if (half == Half::kBFloat16) {
        go(std::integral_constant<Half, Half::kBFloat16>{});
      } else {
        go(std::integral_constant<Half, Half::kFloat16>{});
      }
    });
  });
}

}  // namespace quick
