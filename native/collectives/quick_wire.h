// How a thread's encoded rows lie in a part: planes, so that the stores of a warp are contiguous
// and as wide as they can be. With R rows a part:
//
//   low       256 threads x R x 4 bytes (Q6, Q4) or R x 8 bytes (Q8), in units of up to 16 bytes
//   high      256 threads x R x 2 bytes (Q6)
//   extremes  64 blocks of 32 values x R x 2 bytes
//
// FP: R units of 16 bytes a thread, as they are in the tensor.
#pragma once

#include "collectives/quick_all_reduce.h"
#include "prim/gpu_shuffle.h"
#include "prim/gpu_vec.h"

namespace quick {

// N words of each of 256 threads, at `plane`: in units of 4 words, else 2, else 1.
template <int N>
__device__ __forceinline__ void store_words(char* plane, const uint32_t (&words)[N]) {
  const uint32_t t = threadIdx.x;
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int u = 0; u < N / 4; ++u) {
      gpu::st_relaxed_sys(
          reinterpret_cast<uint4*>(plane) + u * kThreads + t,
          make_uint4(words[4 * u], words[4 * u + 1], words[4 * u + 2], words[4 * u + 3]));
    }
  } else if constexpr (N == 2) {
    gpu::st_relaxed_sys(reinterpret_cast<uint64_t*>(plane) + t,
                        words[0] | uint64_t{words[1]} << 32);
  } else {
    static_assert(N == 1);
    gpu::st_relaxed_sys(reinterpret_cast<uint32_t*>(plane) + t, words[0]);
  }
}

template <int N>
__device__ __forceinline__ void load_words(const char* plane, uint32_t (&words)[N]) {
  const uint32_t t = threadIdx.x;
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int u = 0; u < N / 4; ++u) {
      const uint4 v = gpu::ld_relaxed_sys(reinterpret_cast<const uint4*>(plane) + u * kThreads + t);
      words[4 * u] = v.x;
      words[4 * u + 1] = v.y;
      words[4 * u + 2] = v.z;
      words[4 * u + 3] = v.w;
    }
  } else if constexpr (N == 2) {
    const uint64_t v = gpu::ld_relaxed_sys(reinterpret_cast<const uint64_t*>(plane) + t);
    words[0] = static_cast<uint32_t>(v);
    words[1] = static_cast<uint32_t>(v >> 32);
  } else {
    static_assert(N == 1);
    words[0] = gpu::ld_relaxed_sys(reinterpret_cast<const uint32_t*>(plane) + t);
  }
}

// R values of 16 bits of each of `places` places, `place` being this thread's. A single one is
// paired with that of the place `partner_lanes` away, to make a word.
template <int R>
__device__ __forceinline__ void store_halves(char* plane, uint32_t place, int partner_lanes,
                                             bool writes, const uint16_t (&halves)[R]) {
  if constexpr (R == 4) {
    const uint64_t word = halves[0] | uint64_t{halves[1]} << 16 | uint64_t{halves[2]} << 32 |
                          uint64_t{halves[3]} << 48;
    if (writes) gpu::st_relaxed_sys(reinterpret_cast<uint64_t*>(plane) + place, word);
  } else if constexpr (R == 2) {
    const uint32_t word = halves[0] | uint32_t{halves[1]} << 16;
    if (writes) gpu::st_relaxed_sys(reinterpret_cast<uint32_t*>(plane) + place, word);
  } else {
    static_assert(R == 1);
    const uint32_t other = gpu::shuffle_xor(halves[0], partner_lanes);
    if (writes && place % 2 == 0) {
      gpu::st_relaxed_sys(reinterpret_cast<uint32_t*>(plane) + place / 2, halves[0] | other << 16);
    }
  }
}

template <int R>
__device__ __forceinline__ void load_halves(const char* plane, uint32_t place,
                                            uint16_t (&halves)[R]) {
  if constexpr (R == 4) {
    const uint64_t word = gpu::ld_relaxed_sys(reinterpret_cast<const uint64_t*>(plane) + place);
#pragma unroll
    for (int r = 0; r < R; ++r) halves[r] = static_cast<uint16_t>(word >> (16 * r));
  } else if constexpr (R == 2) {
    const uint32_t word = gpu::ld_relaxed_sys(reinterpret_cast<const uint32_t*>(plane) + place);
    halves[0] = static_cast<uint16_t>(word);
    halves[1] = static_cast<uint16_t>(word >> 16);
  } else {
    static_assert(R == 1);
    const uint32_t word = gpu::ld_relaxed_sys(reinterpret_cast<const uint32_t*>(plane) + place / 2);
    halves[0] = static_cast<uint16_t>(word >> (16 * (place % 2)));
  }
}

template <Half H>
struct Element {
  using type = gpu::Half;
};
template <>
struct Element<Half::kBFloat16> {
  using type = gpu::BFloat16;
};
template <Half H>
using Floats = gpu::Floats<typename Element<H>::type>;

// A thread's share of one part, encoded.
template <Codec C, Half H, int R>
struct Encoded {
  static constexpr int kBits = bits_of(C);
  static constexpr int kLow = kBits == 8 ? 2 * R : R;
  static constexpr uint64_t kHighOffset = uint64_t{kThreads} * kLow * 4;
  static constexpr uint64_t kExtremeOffset = kHighOffset + (kBits == 6 ? kThreads * R * 2 : 0);

  uint32_t low[kLow];
  uint16_t high[R];
  uint16_t extreme[R];

  __device__ __forceinline__ void encode(int row, const Floats<H>& values) {
    Extreme found = extreme_of(values.x);
#pragma unroll
    for (int lanes = 1; lanes < kThreadsPerBlock; lanes *= 2) {
      found = merge(found, {gpu::shuffle_xor(found.positive, lanes),
                            gpu::shuffle_xor(found.negative, lanes)});
    }
    extreme[row] = away_from_zero<H>(signed_extreme(found));
    const Codes codes = encode_thread<kBits>(values.x, widen<H>(extreme[row]));
    if constexpr (kBits == 8) {
      low[2 * row] = codes.low[0];
      low[2 * row + 1] = codes.low[1];
    } else {
      low[row] = codes.low[0];
    }
    high[row] = static_cast<uint16_t>(codes.high);
  }

  __device__ __forceinline__ void decode(int row, Floats<H>& values) const {
    Codes codes{{0, 0}, high[row]};
    if constexpr (kBits == 8) {
      codes.low[0] = low[2 * row];
      codes.low[1] = low[2 * row + 1];
    } else {
      codes.low[0] = low[row];
    }
    decode_thread<kBits>(codes, widen<H>(extreme[row]), values.x);
  }

  __device__ __forceinline__ void store(char* part) const {
    store_words(part, low);
    if constexpr (kBits == 6) store_halves(part + kHighOffset, threadIdx.x, 1, true, high);
    store_halves(part + kExtremeOffset, threadIdx.x / kThreadsPerBlock, kThreadsPerBlock,
                 threadIdx.x % kThreadsPerBlock == 0, extreme);
  }

  __device__ __forceinline__ void load(const char* part) {
    load_words(part, low);
    if constexpr (kBits == 6) load_halves(part + kHighOffset, threadIdx.x, high);
    load_halves(part + kExtremeOffset, threadIdx.x / kThreadsPerBlock, extreme);
  }
};

template <Half H, int R>
struct Encoded<Codec::kFp, H, R> {
  uint32_t words[4 * R];

  __device__ __forceinline__ void encode(int row, const Floats<H>& values) {
    const uint4 v = values.rounded();
    words[4 * row] = v.x;
    words[4 * row + 1] = v.y;
    words[4 * row + 2] = v.z;
    words[4 * row + 3] = v.w;
  }
  __device__ __forceinline__ void decode(int row, Floats<H>& values) const {
    values = Floats<H>(
        make_uint4(words[4 * row], words[4 * row + 1], words[4 * row + 2], words[4 * row + 3]));
  }
  __device__ __forceinline__ void store(char* part) const { store_words(part, words); }
  __device__ __forceinline__ void load(const char* part) { load_words(part, words); }
};

}  // namespace quick
