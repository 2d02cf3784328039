// The kernel of the quantized two-shot all-reduce, see quick_all_reduce.h.
//
// Work is cut into messages: number k of an owner is the k-th group of 4 vectors a lane among its
// rows. A thread does the numbers k, k + threads of the grid, ... in all three steps, so in place
// needs no further care. A turn of its loop sends one number, reduces an earlier one and gathers
// one earlier still, whose parts arrived meanwhile; all that the turn reads is loaded before it
// works. A thread waits for single messages and meets no other thread.
#include <algorithm>

#include "collectives/quick_all_reduce.h"
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

template <Codec C, DType H, int W>
class Kernel {
 public:
  using Sent = Message<C, H>;
  using Span = gpu::SpanOf<typename Element<H>::type>;

  __device__ __forceinline__ Kernel(const View& view, const Span& inp, const Span& out,
                                    const Work& work, uint64_t epoch)
      : view_(view), inp_(inp), out_(out), work_(work), epoch_(epoch) {}

  // One turn: what each step reads first is loaded before the first step works.
  __device__ __forceinline__ void turn(uint32_t sent, uint32_t reduced, uint32_t gathered) {
    Vectors theirs, own;
    Sent part, sum;
    constexpr bool kEarly = C != Codec::kFp;  // whose messages take too many registers
    if (sent < work_.messages) theirs = load(peer(1), sent);
    if (reduced < work_.messages) {
      part.load(this->part(view_.rank, sender(0), 0), reduced, work_.room);
      own = load(view_.rank, reduced);
    }
    const auto look = [&] { sum.load(this->part(view_.rank, peer(1), 1), gathered, work_.room); };
    if (kEarly && gathered < work_.messages) look();
    if (sent < work_.messages) scatter(sent, theirs);
    if (reduced < work_.messages) reduce(reduced, own, part);
    if (gathered < work_.messages) {
      if (!kEarly) look();
      gather(gathered, sum);
    }
  }

 private:
  // The peers in an order in which not everybody turns to the same one at once.
  __device__ __forceinline__ uint32_t peer(uint32_t turn) const { return (view_.rank + turn) % W; }
  // The peers in rank order.
  __device__ __forceinline__ uint32_t sender(uint32_t place) const {
    return place < view_.rank ? place : place + 1;
  }

  // Sends the peers their rows of message k; `values` are those of the first.
  __device__ __forceinline__ void scatter(uint32_t k, Vectors values) {
#pragma unroll 1
    for (uint32_t turn = 1; turn < W; ++turn) {
      Sent sent;
      sent.encode(values);
      if (turn + 1 < W) values = load(peer(turn + 1), k);
      sent.seal();
      sent.store(part(peer(turn), view_.rank, 0), k, work_.room);
    }
  }

  // Sums this rank's rows of message k, keeps them, and sends them to the peers. `next` is a first
  // look at the first sender's.
  __device__ __forceinline__ void reduce(uint32_t k, const Vectors& own, Sent next) {
    Floats<H> sum[kQuad] = {minus_zeros(), minus_zeros(), minus_zeros(), minus_zeros()};
    const auto add_own = [&] {
#pragma unroll
      for (int s = 0; s < kQuad; ++s) gpu::accumulate(sum[s], Floats<H>(own.of[s]));
    };
    bool complete = true;
#pragma unroll 1
    for (uint32_t place = 0; place < W - 1; ++place) {
      if (place == view_.rank) add_own();
      complete = receive(next, sender(place), k, 0) && complete;
      const Sent theirs = next;
      if (place + 1 < W - 1) next.load(part(view_.rank, sender(place + 1), 0), k, work_.room);
      theirs.decode([&](int s, const Floats<H>& values) { gpu::accumulate(sum[s], values); });
    }
    if (view_.rank == W - 1) add_own();
    // A sum without all of its parts goes nowhere: the peers are late then, too.
    if (gpu::any_lane(!complete)) return;
    Sent sent;
    sent.encode_sum(sum);
    store(view_.rank, k, sent);
    sent.seal();
#pragma unroll 1
    for (uint32_t turn = 1; turn < W; ++turn) {
      sent.store(part(peer(turn), view_.rank, 1), k, work_.room);
    }
  }

  // Decodes the other owners' sums of message k. `next` is a first look at the first one's.
  __device__ __forceinline__ void gather(uint32_t k, Sent next) {
#pragma unroll 1
    for (uint32_t turn = 1; turn < W; ++turn) {
      receive(next, peer(turn), k, 1);
      const Sent sums = next;
      if (turn + 1 < W) next.load(part(view_.rank, peer(turn + 1), 1), k, work_.room);
      store(peer(turn), k, sums);
    }
  }

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
    Vectors v;
    sums.decode([&](int s, const Floats<H>& values) { v.of[s] = values.rounded(); });
    if (out_.whole(first + 32 * (kQuad - 1))) {
#pragma unroll
      for (int s = 0; s < kQuad; ++s) {
        reinterpret_cast<uint4*>(out_.data)[first + 32 * s] = v.of[s];
      }
    } else {
#pragma unroll
      for (int s = 0; s < kQuad; ++s) out_.store(first + 32 * s, v.of[s]);
    }
  }

  // `sender`'s part of an area of `owner`.
  __device__ __forceinline__ char* part(uint32_t owner, uint32_t sender, int shot) const {
    const uint32_t among = sender < owner ? sender : sender - 1;
    constexpr uint32_t kBytes = part_bytes(C, W) / messages_of_tile(W);
    return view_.area(owner, epoch_, shot) + uint64_t{among} * work_.room * kBytes;
  }

  // Waits for a message that has been looked at once, and frees its place. False: it did not come.
  __device__ __forceinline__ bool receive(Sent& sent, uint32_t sender, uint32_t k, int shot) {
    char* from = part(view_.rank, sender, shot);
    spin_.begin();
    while (!sent.arrived()) {
      if (spin_.give_up(view_.spin, sender, epoch_, k, 0, 0)) return false;
      sent.load(from, k, work_.room);
    }
    Sent::clear(from, k, work_.room);
    sent.unseal();
    return true;
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

template <Codec C, DType H, int W>
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
  // Whole warps take part in a step or do not: the lanes of a quad exchange values. Numbers wrap
  // around where a step has not begun.
  const uint32_t lag = work.ahead * stride;
  for (uint32_t k = first; k < work.messages + 2 * lag; k += stride) {
    if (k == first + stride && threadIdx.x == 0) mark_busy(view, control.words[blockIdx.x], epoch);
    kernel.turn(k, k - lag, k - 2 * lag);
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
  prim::fail(prim::kInvalid, "the world size is ", world, "; it must be 2, 4 or 8");
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
  prim::fail(prim::kInvalid, "the codec is not FP, Q8, Q6 or Q4");
}

}  // namespace

uint64_t tiles_at_once(const View& view, uint32_t world, Codec codec) {
  return view.area_bytes / (part_bytes(codec, world) * (world - 1));
}

void all_reduce(const View& view, uint32_t world, Codec codec, DType dtype, const void* inp,
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
        constexpr DType H = decltype(dtype)::value;
        using Span = gpu::SpanOf<typename Element<H>::type>;
        gpu::launch<quick_all_reduce_kernel<C, H, W>>(
            {blocks, launch.threads, stream, launch.overlap}, "quick_all_reduce", view,
            Span(inp, bytes), Span(out, bytes), work);
      };
      switch (dtype) {
        case DType::kBFloat16:
          return go(std::integral_constant<DType, DType::kBFloat16>{});
        case DType::kFloat16:
          return go(std::integral_constant<DType, DType::kFloat16>{});
        default:
          prim::fail(prim::kInvalid, "the sums are of float16 or bfloat16");
      }
    });
  });
}

}  // namespace quick
