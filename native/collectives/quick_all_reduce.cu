// The kernel of the quantized two-shot all-reduce, see quick_all_reduce.h.
//
// A block does the same tiles in all three steps, and a thread the same vectors, so in place needs
// no further care. A block waits only for blocks of its own number on other ranks.
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

// (epoch, tiles of this call) as one rising number.
__device__ __forceinline__ uint64_t progress(uint64_t epoch, uint64_t tiles) {
  return (epoch << 24) + tiles;
}

template <Codec C, Half H, int W>
class Kernel {
 public:
  static constexpr int kRows = kTileRows / W;  // a rank's of a tile
  using Part = Encoded<C, H, kRows>;
  using Span = gpu::SpanOf<typename Element<H>::type>;

  __device__ __forceinline__ Kernel(const View& view, const Span& inp, const Span& out,
                                    uint64_t epoch)
      : view_(view), inp_(inp), out_(out), epoch_(epoch) {}

  // Encodes the peers' rows into their buffers.
  __device__ __forceinline__ void scatter(uint32_t tiles) {
    uint64_t done = 0;
    for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
#pragma unroll
      for (int turn = 1; turn < W; ++turn) {
        const uint32_t peer = (view_.rank + turn) % W;  // not everybody to the same peer at once
        Part part;
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          part.encode(row, Floats<H>(inp_.load(vector(tile, peer, row))));
        }
        part.store(place(peer, view_.rank, tile, 0));
      }
      announce(0, ++done);
    }
  }

  // Sums this rank's rows, keeps them, and sends them to the peers.
  __device__ __forceinline__ void reduce(uint32_t tiles) {
    uint64_t done = 0;
    for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      Part parts[W];  // the own one is left as it is
      wait(0, ++done);
#pragma unroll
      for (int rank = 0; rank < W; ++rank) {
        if (rank != static_cast<int>(view_.rank))
          parts[rank].load(place(view_.rank, rank, tile, 0));
      }
      Part sums;
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const uint64_t at = vector(tile, view_.rank, row);
        const Floats<H> own(inp_.load(at));
        Floats<H> total(own);
#pragma unroll
        for (int rank = 0; rank < W; ++rank) {
          Floats<H> theirs(own);
          if (rank != static_cast<int>(view_.rank)) parts[rank].decode(row, theirs);
          if (rank == 0) {
            total = theirs;
          } else {
            gpu::accumulate(total, theirs);
          }
        }
        sums.encode(row, total);
        sums.decode(row, total);
        out_.store(at, total.rounded());
      }
#pragma unroll
      for (int turn = 1; turn < W; ++turn) {
        const uint32_t peer = (view_.rank + turn) % W;
        sums.store(place(peer, view_.rank, tile, 1));
      }
      announce(1, done);
    }
  }

  // Decodes the sums of the other owners.
  __device__ __forceinline__ void gather(uint32_t tiles) {
    uint64_t done = 0;
    for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      wait(1, ++done);
#pragma unroll
      for (int turn = 1; turn < W; ++turn) {
        const uint32_t peer = (view_.rank + turn) % W;
        Part part;
        part.load(place(view_.rank, peer, tile, 1));
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          Floats<H> values(make_uint4(0, 0, 0, 0));
          part.decode(row, values);
          out_.store(vector(tile, peer, row), values.rounded());
        }
      }
    }
  }

 private:
  __device__ __forceinline__ uint64_t vector(uint32_t tile, uint32_t owner, int row) const {
    return (uint64_t{tile} * kTileRows + owner * kRows + row) * kRowVectors + threadIdx.x;
  }

  // Where `sender`'s part of a tile lies in `owner`'s buffer.
  __device__ __forceinline__ char* place(uint32_t owner, uint32_t sender, uint32_t tile,
                                         int shot) const {
    const uint32_t among = sender < owner ? sender : sender - 1;
    return view_.area(owner, epoch_, shot) + (uint64_t{tile} * (W - 1) + among) * part_bytes(C, W);
  }

  // Tells every peer that this block's parts of one more tile are there.
  __device__ __forceinline__ void announce(int shot, uint64_t tiles) {
    gpu::sync_before_release();
    if (threadIdx.x < W && threadIdx.x != view_.rank) {
      Control& peer = view_.control(threadIdx.x);
      gpu::st_release_sys(&peer.arrived[shot][view_.rank][blockIdx.x], progress(epoch_, tiles));
    }
  }

  __device__ __forceinline__ void wait(int shot, uint64_t tiles) {
    if (threadIdx.x < W && threadIdx.x != view_.rank) {
      gpu::wait_acquire(spin_, view_.spin,
                        &view_.control(view_.rank).arrived[shot][threadIdx.x][blockIdx.x],
                        progress(epoch_, tiles), threadIdx.x, epoch_, tiles);
    }
    __syncthreads();
  }

  const View& view_;
  const Span& inp_;
  const Span& out_;
  const uint64_t epoch_;
  gpu::Spin spin_;
};

template <Codec C, Half H, int W>
__global__ void __launch_bounds__(kThreads)
    quick_all_reduce_kernel(const __grid_constant__ View view,
                            const gpu::SpanOf<typename Element<H>::type> inp,
                            const gpu::SpanOf<typename Element<H>::type> out, uint32_t tiles) {
  __shared__ uint64_t before;
  __shared__ uint32_t aborted;
  gpu::dependency_wait();
  gpu::launch_dependents();
  Control& control = view.control(view.rank);
  if (threadIdx.x == 0) {
    aborted = gpu::ld_relaxed_sys(&control.aborted);
    before = gpu::fetch_or_relaxed_gpu(&control.state[blockIdx.x], 1);
  }
  __syncthreads();
  if (aborted != 0) return;
  const uint64_t epoch = before >> 1;
  if ((before & 1) != 0) {  // a second call in flight, on another stream
    if (threadIdx.x == 0) {
      gpu::report_once(view.spin, gpu::kSpinBusy, view.rank, epoch, blockIdx.x, epoch, before, 0);
    }
    return;
  }
  Kernel<C, H, W> kernel(view, inp, out, epoch);
  kernel.scatter(tiles);
  kernel.reduce(tiles);
  kernel.gather(tiles);
  // The next call may have more blocks: block b keeps the words b, b + G, ... at the same epoch,
  // and no block reads a word that another block of its call writes.
  for (uint32_t b = blockIdx.x + threadIdx.x * gridDim.x; b < kMaxBlocks;
       b += blockDim.x * gridDim.x) {
    gpu::st_relaxed_sys(&control.state[b], (epoch + 1) * 2);
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
  const int blocks =
      static_cast<int>(tiles) < launch.blocks ? static_cast<int>(tiles) : launch.blocks;
  by_world(world, [&](auto number) {
    by_codec(codec, [&](auto chosen) {
      const auto go = [&](auto dtype) {
        constexpr int W = decltype(number)::value;
        constexpr Codec C = decltype(chosen)::value;
        constexpr Half H = decltype(dtype)::value;
        using Span = gpu::SpanOf<typename Element<H>::type>;
        gpu::launch<quick_all_reduce_kernel<C, H, W>>({blocks, kThreads, stream, launch.overlap},
                                                      "quick_all_reduce", view, Span(inp, bytes),
                                                      Span(out, bytes), tiles);
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
