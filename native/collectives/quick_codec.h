// The block codecs of the quantized all-reduce. Host and device compile these same functions, and
// every step is exact or rounded once by IEEE rules, so both give the same bits.
//
// A block is 32 values. Its signed extreme value m (largest magnitude) travels in 16 bits, in the
// tensor's dtype, and each value as an integer q of b bits:
//
//   step  = -m / 2^(b-1)                        exact in fp32
//   q     = round(value / step), at most 2^(b-1) - 1        so m itself is -2^(b-1), exactly
//   value ~ q * step                            exact in fp32
//
// The error is at most half a step, and one step for values near -m, which are clamped.
// (QuickReduce of mk1-project and its descendants in vLLM and SGLang have this mapping; they keep m
// / 2^(b-1) in fp16, where it can overflow or lose bits.)
//
//   no value above 2^-118   the block becomes zeros: 2^(b-1) / m would overflow
//   a NaN, or inf of both signs, or a sum whose extreme value overflows the dtype
//                           the block becomes NaN, or inf of the overflow's sign
//   inf of one sign         the block becomes that inf
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "prim/host_device.h"

namespace quick {

inline constexpr int kBlock = 32;     // values that share an m
inline constexpr int kPerThread = 8;  // values that one thread encodes
inline constexpr int kThreadsPerBlock = kBlock / kPerThread;

enum class Codec : int { kFp = 0, kQ8 = 1, kQ6 = 2, kQ4 = 3 };
enum class Half : int { kFloat16 = 0, kBFloat16 = 1 };  // the 16-bit dtype of the tensor

constexpr int bits_of(Codec codec) {
  return codec == Codec::kFp ? 16 : codec == Codec::kQ8 ? 8 : codec == Codec::kQ6 ? 6 : 4;
}

inline constexpr uint32_t kInf = 0x7f800000u;
inline constexpr uint32_t kSmallest = uint32_t{127 - 118} << 23;  // 2^-118

// Magnitudes, as the bits of an fp32, of the largest value of each sign. NaN is above inf.
struct Extreme {
  uint32_t positive = 0;
  uint32_t negative = 0;
};

HOST_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

HOST_DEVICE Extreme merge(Extreme a, Extreme b) {
  return {larger(a.positive, b.positive), larger(a.negative, b.negative)};
}

HOST_DEVICE Extreme extreme_of(const float (&x)[kPerThread]) {
  Extreme found;
  UNROLL
  for (int i = 0; i < kPerThread; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(x[i]);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (bits >> 31) {
      found.negative = larger(found.negative, magnitude);
    } else {
      found.positive = larger(found.positive, magnitude);
    }
  }
  return found;
}

// m as fp32 bits; of two equal magnitudes the positive one.
HOST_DEVICE uint32_t signed_extreme(Extreme e) {
  if (e.positive >= kInf && e.negative >= kInf) return 0x7fc00000u;
  return e.positive >= e.negative ? e.positive : e.negative | 0x80000000u;
}

// fp32 bits -> 16 bits of the dtype, away from zero, so that no value of the block exceeds m. A
// value that has the dtype already stays as it is.
template <Half H>
HOST_DEVICE uint16_t away_from_zero(uint32_t bits) {
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude < kSmallest) return 0;
  if constexpr (H == Half::kBFloat16) {
    if (magnitude > kInf) return 0x7fc0;
    return static_cast<uint16_t>(sign | (magnitude + 0xffffu) >> 16);
  } else {
    if (magnitude > kInf) return 0x7e00;
    if (magnitude > 0x477fe000u) return static_cast<uint16_t>(sign | 0x7c00u);  // above 65504
    if (magnitude < 0x38800000u) {  // below 2^-14: multiples of 2^-24
      const float units = std::bit_cast<float>(magnitude) * 16777216.0f;
      return static_cast<uint16_t>(sign | static_cast<uint32_t>(ceilf(units)));
    }
    return static_cast<uint16_t>(sign | (((magnitude + 0x1fffu) >> 13) - (112u << 10)));
  }
}

// 16 bits of the dtype -> fp32, exactly.
template <Half H>
HOST_DEVICE float widen(uint16_t half) {
  if constexpr (H == Half::kBFloat16) {
    return std::bit_cast<float>(uint32_t{half} << 16);
  } else {
    const uint32_t sign = (uint32_t{half} & 0x8000u) << 16;
    const uint32_t magnitude = uint32_t{half} & 0x7fffu;
    if (magnitude >= 0x7c00u) {
      return std::bit_cast<float>(sign | kInf | (magnitude & 0x3ffu) << 13);
    }
    // 2^112 corrects the exponent's bias, of subnormals too.
    const float value = std::bit_cast<float>(magnitude << 13) * 5.192296858534828e33f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(value));
  }
}

// What values are multiplied with to encode, and to decode. m is finite.
template <int B>
HOST_DEVICE float inverse_step(float m) {
  return m == 0.0f ? 0.0f : -static_cast<float>(1 << (B - 1)) / m;
}
// inf and NaN pass: q * inf is NaN or inf, see decode().
template <int B>
HOST_DEVICE float step_of(float m) {
  return m * (-1.0f / static_cast<float>(1 << (B - 1)));
}

inline constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
inline constexpr uint32_t kRoundBits = 0x4b400000u;

// q + 2^(b-1), which is not negative. One rounding, to the nearest integer, ties to even.
template <int B>
HOST_DEVICE uint32_t encode(float x, float inverse) {
  constexpr int32_t kMost = (1 << (B - 1)) - 1;
  const float rounded = fmaf(x, inverse, kRound);
  const int32_t q = static_cast<int32_t>(std::bit_cast<uint32_t>(rounded) - kRoundBits);
  return static_cast<uint32_t>((q < kMost ? q : kMost) + (1 << (B - 1)));
}

template <int B>
HOST_DEVICE float decode(uint32_t code, float step) {
  // The integer in the low bits of 1.5 * 2^23 is that much more than it.
  const float q = std::bit_cast<float>(kRoundBits - (1u << (B - 1)) + code) - kRound;
  return q * step;
}

// What one thread puts on the wire for its 8 values, beside the block's m: `low` holds 8 or 4 bits
// a value, `high` the upper 2 bits of 6.
struct Codes {
  uint32_t low[2];
  uint32_t high;
};

template <int B>
HOST_DEVICE Codes encode_thread(const float (&x)[kPerThread], float m) {
  Codes codes{{0, 0}, 0};
  // A block that is inf or NaN as a whole has no values; its codes are zeros.
  const bool finite = (std::bit_cast<uint32_t>(m) & kInf) != kInf;
  const float inverse = finite ? inverse_step<B>(m) : 0.0f;
  UNROLL
  for (int i = 0; i < kPerThread; ++i) {
    const uint32_t code = finite ? encode<B>(x[i], inverse) : 0;
    if constexpr (B == 8) {
      codes.low[i / 4] |= code << (i % 4 * 8);
    } else {
      codes.low[0] |= (code & 15u) << (i * 4);
      if constexpr (B == 6) codes.high |= (code >> 4) << (i * 2);
    }
  }
  return codes;
}

template <int B>
HOST_DEVICE void decode_thread(const Codes& codes, float m, float (&x)[kPerThread]) {
  const bool finite = (std::bit_cast<uint32_t>(m) & kInf) != kInf;
  const float step = step_of<B>(m);
  UNROLL
  for (int i = 0; i < kPerThread; ++i) {
    uint32_t code;
    if constexpr (B == 8) {
      code = codes.low[i / 4] >> (i % 4 * 8) & 255u;
    } else {
      code = codes.low[0] >> (i * 4) & 15u;
      if constexpr (B == 6) code |= (codes.high >> (i * 2) & 3u) << 4;
    }
    x[i] = finite ? decode<B>(code, step) : m;
  }
}

}  // namespace quick
