// What one thread sends of a message: 32 values of 4 blocks, 8 of each. The four lanes of a quad
// hold 4 blocks; lane j takes care of the extreme value of block j. How it lies in a part, with
// room for K threads:
//
//   words  K x 16 bytes, K x 16 (Q8) or K x 8 (Q6) bytes; FP: 4 times K x 16
//   m      K x 2 bytes; not FP
//
// so that the stores of a warp are contiguous. A place at rest is zero: quick_codec.h, seal().
#pragma once

#include "collectives/quick_all_reduce.h"
#include "prim/gpu_shuffle.h"
#include "prim/gpu_vec.h"

namespace quick {

template <DType H>
struct Element {
  using type = gpu::Half;
};
template <>
struct Element<DType::kBFloat16> {
  using type = gpu::BFloat16;
};
template <DType H>
using Floats = gpu::Floats<typename Element<H>::type>;

inline constexpr int kQuad = 4;  // lanes, blocks and vectors of a lane
static_assert(kQuad == kGroups);

// Vector s of lane j of a quad is part j of block s.
struct Vectors {
  uint4 of[kQuad];
};

// The magnitudes of both signs as 16-bit integers, the positive one in the lower half.
__device__ __forceinline__ uint32_t extreme_of(uint4 v) {
  // As in extreme_of() of floats; two halves at a time.
  uint32_t positive = gpu::max_s16x2(gpu::max_s16x2(v.x, v.y), gpu::max_s16x2(v.z, v.w));
  uint32_t negative = gpu::max_u16x2(gpu::max_u16x2(v.x, v.y), gpu::max_u16x2(v.z, v.w));
  positive = gpu::max_s16x2(gpu::max_s16x2(positive, positive >> 16), 0);
  negative = gpu::max_u16x2(negative, negative >> 16);
  negative = (negative & 0x8000u) != 0 ? negative & 0x7fffu : 0;
  return (positive & 0xffffu) | negative << 16;
}

// Lane j of a quad gets the quad's merged item j.
template <typename Item, typename Exchange, typename Merge>
__device__ __forceinline__ Item reduce_scatter(const Item (&items)[kQuad], Exchange exchange,
                                               Merge merge) {
  const bool upper = (threadIdx.x & 2) != 0;
  const bool odd = (threadIdx.x & 1) != 0;
  const Item first = merge(upper ? items[2] : items[0], exchange(upper ? items[0] : items[2], 2));
  const Item second = merge(upper ? items[3] : items[1], exchange(upper ? items[1] : items[3], 2));
  return merge(odd ? second : first, exchange(odd ? first : second, 1));
}

// The m of block j, for lane j.
template <DType H>
__device__ __forceinline__ uint16_t extreme_of_quad(const Vectors& v) {
  uint32_t extremes[kQuad];
#pragma unroll
  for (int s = 0; s < kQuad; ++s) extremes[s] = extreme_of(v.of[s]);
  const uint32_t mine = reduce_scatter(
      extremes, [](uint32_t item, int lanes) { return gpu::shuffle_xor(item, lanes); },
      [](uint32_t a, uint32_t b) { return gpu::max_u16x2(a, b); });
  const auto bits = [](uint32_t half) {
    return std::bit_cast<uint32_t>(widen<H>(static_cast<uint16_t>(half)));
  };
  return away_from_zero<H>(signed_extreme({bits(mine & 0xffffu), bits(mine >> 16)}));
}

template <DType H>
__device__ __forceinline__ uint16_t extreme_of_quad(const Floats<H> (&x)[kQuad]) {
  Extreme extremes[kQuad];
#pragma unroll
  for (int s = 0; s < kQuad; ++s) extremes[s] = extreme_of(x[s].x);
  const Extreme mine = reduce_scatter(
      extremes,
      [](Extreme item, int lanes) {
        return Extreme{gpu::shuffle_xor(item.positive, lanes),
                       gpu::shuffle_xor(item.negative, lanes)};
      },
      [](Extreme a, Extreme b) {
        return Extreme{larger(a.positive, b.positive), larger(a.negative, b.negative)};
      });
  return away_from_zero<H>(signed_extreme(mine));
}

__device__ __forceinline__ float of_quad(float value, int lane) {
  return std::bit_cast<float>(gpu::shuffle_quad(std::bit_cast<uint32_t>(value), lane));
}

__device__ __forceinline__ bool is_absent(uint4 v) {
  return v.x == kAbsent || v.y == kAbsent || v.z == kAbsent || v.w == kAbsent;
}

// N words of thread k among K, at `plane`.
template <int N>
struct Plane {
  static_assert(N % 4 == 0 || N % 4 == 2);
  static constexpr int kVectors = N / 4;

  static __device__ __forceinline__ void store(char* plane, uint32_t k, uint32_t room,
                                               const uint32_t (&words)[N]) {
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      gpu::st_relaxed_sys(
          reinterpret_cast<uint4*>(plane) + uint64_t{room} * u + k,
          make_uint4(words[4 * u], words[4 * u + 1], words[4 * u + 2], words[4 * u + 3]));
    }
    if constexpr (N % 4 == 2) {
      gpu::st_relaxed_sys(reinterpret_cast<uint64_t*>(plane + uint64_t{room} * kVectors * 16) + k,
                          words[N - 2] | uint64_t{words[N - 1]} << 32);
    }
  }

  static __device__ __forceinline__ void load(const char* plane, uint32_t k, uint32_t room,
                                              uint32_t (&words)[N]) {
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      const uint4 v =
          gpu::ld_relaxed_sys(reinterpret_cast<const uint4*>(plane) + uint64_t{room} * u + k);
      words[4 * u] = v.x;
      words[4 * u + 1] = v.y;
      words[4 * u + 2] = v.z;
      words[4 * u + 3] = v.w;
    }
    if constexpr (N % 4 == 2) {
      const uint64_t v = gpu::ld_relaxed_sys(
          reinterpret_cast<const uint64_t*>(plane + uint64_t{room} * kVectors * 16) + k);
      words[N - 2] = static_cast<uint32_t>(v);
      words[N - 1] = static_cast<uint32_t>(v >> 32);
    }
  }
};

template <Codec C, DType H>
struct Message {
  static constexpr int kBits = bits_of(C);
  static constexpr int kWords = kBits;  // 32 codes of so many bits

  uint32_t words[kWords];
  uint16_t m;

  __device__ __forceinline__ void encode_values(const Floats<H> (&x)[kQuad]) {
    const float inverse = inverse_step<kBits>(widen<H>(m));
    uint32_t codes[kBlock / 4];
#pragma unroll
    for (int s = 0; s < kQuad; ++s) {
      const float factor = of_quad(inverse, s);
      codes[2 * s] = encode4<kBits>(x[s].x, factor);
      codes[2 * s + 1] = encode4<kBits>(x[s].x + 4, factor);
    }
    pack<kBits>(codes, words);
  }
  __device__ __forceinline__ void encode(const Vectors& v) {
    m = extreme_of_quad<H>(v);
    encode_values({Floats<H>(v.of[0]), Floats<H>(v.of[1]), Floats<H>(v.of[2]), Floats<H>(v.of[3])});
  }
  __device__ __forceinline__ void encode_sum(const Floats<H> (&x)[kQuad]) {
    m = extreme_of_quad<H>(x);
    encode_values(x);
  }

  // body(s, values of vector s)
  template <typename Body>
  __device__ __forceinline__ void decode(Body body) const {
    const float step = step_of<kBits>(widen<H>(m));
    uint32_t codes[kBlock / 4];
    unpack<kBits>(words, codes);
#pragma unroll
    for (int s = 0; s < kQuad; ++s) {
      const float factor = of_quad(step, s);
      Floats<H> values(make_uint4(0, 0, 0, 0));
      decode4<kBits>(codes[2 * s], factor, values.x);
      decode4<kBits>(codes[2 * s + 1], factor, values.x + 4);
      body(s, values);
    }
  }

  static __device__ __forceinline__ uint16_t* place_of_m(char* part, uint32_t k, uint32_t room) {
    return reinterpret_cast<uint16_t*>(part + uint64_t{room} * kWords * 4) + k;
  }
  __device__ __forceinline__ void seal() { m = quick::seal(words, m); }
  __device__ __forceinline__ void unseal() { m = quick::unseal(words, m); }
  __device__ __forceinline__ void store(char* part, uint32_t k, uint32_t room) const {
    Plane<kWords>::store(part, k, room, words);
    gpu::st_relaxed_sys(place_of_m(part, k, room), m);
  }
  __device__ __forceinline__ void load(char* part, uint32_t k, uint32_t room) {
    Plane<kWords>::load(part, k, room, words);
    m = gpu::ld_relaxed_sys(place_of_m(part, k, room));
  }
  __device__ __forceinline__ bool arrived() const {
    bool absent = m == kAbsent;
#pragma unroll
    for (int i = 0; i < kWords; ++i) absent = absent || words[i] == kAbsent;
    return !absent;
  }
  static __device__ __forceinline__ void clear(char* part, uint32_t k, uint32_t room) {
    const Message absent{};
    absent.store(part, k, room);
  }
};

// The tensor's own bits, inverted; a pair of NaNs of all ones becomes another pair.
template <DType H>
struct Message<Codec::kFp, H> {
  static constexpr int kWords = 4 * kQuad;

  uint32_t words[kWords];

  __device__ __forceinline__ void encode(const Vectors& v) {
#pragma unroll
    for (int s = 0; s < kQuad; ++s) {
      words[4 * s] = v.of[s].x;
      words[4 * s + 1] = v.of[s].y;
      words[4 * s + 2] = v.of[s].z;
      words[4 * s + 3] = v.of[s].w;
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = words[i] == ~kAbsent ? ~kAbsent - 1 : words[i];
  }
  __device__ __forceinline__ void encode_sum(const Floats<H> (&x)[kQuad]) {
    encode(Vectors{{x[0].rounded(), x[1].rounded(), x[2].rounded(), x[3].rounded()}});
  }
  template <typename Body>
  __device__ __forceinline__ void decode(Body body) const {
#pragma unroll
    for (int s = 0; s < kQuad; ++s) {
      body(s, Floats<H>(
                  make_uint4(words[4 * s], words[4 * s + 1], words[4 * s + 2], words[4 * s + 3])));
    }
  }
  __device__ __forceinline__ void seal() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = ~words[i];
  }
  __device__ __forceinline__ void unseal() { seal(); }
  __device__ __forceinline__ void store(char* part, uint32_t k, uint32_t room) const {
    Plane<kWords>::store(part, k, room, words);
  }
  __device__ __forceinline__ void load(char* part, uint32_t k, uint32_t room) {
    Plane<kWords>::load(part, k, room, words);
  }
  __device__ __forceinline__ bool arrived() const {
    bool absent = false;
#pragma unroll
    for (int i = 0; i < kWords; ++i) absent = absent || words[i] == kAbsent;
    return !absent;
  }
  static __device__ __forceinline__ void clear(char* part, uint32_t k, uint32_t room) {
    const Message absent{};
    absent.store(part, k, room);
  }
};

}  // namespace quick
