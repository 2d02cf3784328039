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

#include "prim/dtype.h"
#include "prim/host_device.h"

namespace quick {

inline constexpr int kBlock = 32;  // values that share an m
inline constexpr int kGroup = 8;   // values that are encoded together: 16 bytes of the tensor
inline constexpr int kGroups = kBlock / kGroup;

enum class Codec : int { kFp = 0, kQ8 = 1, kQ6 = 2, kQ4 = 3 };

constexpr int bits_of(Codec codec) {
  return codec == Codec::kFp ? 16 : codec == Codec::kQ8 ? 8 : codec == Codec::kQ6 ? 6 : 4;
}

inline constexpr uint32_t kInf = 0x7f800000u;
inline constexpr uint32_t kSmallest = uint32_t{127 - 118} << 23;  // 2^-118

HOST_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// Magnitudes, as the bits of an fp32, of the largest value of each sign. NaN is above inf.
struct Extreme {
  uint32_t positive = 0;
  uint32_t negative = 0;
};

template <int N>
HOST_DEVICE Extreme extreme_of(const float (&x)[N]) {
  // Among the bits of floats, the positive ones are the larger as signed integers, and the negative
  // ones as unsigned integers.
  int32_t positive = 0;
  uint32_t negative = 0;
  UNROLL
  for (int i = 0; i < N; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(x[i]);
    const auto number = static_cast<int32_t>(bits);
    positive = positive > number ? positive : number;
    negative = larger(negative, bits);
  }
  return {static_cast<uint32_t>(positive), negative >> 31 ? negative & 0x7fffffffu : 0};
}

// m as fp32 bits; of two equal magnitudes the positive one.
HOST_DEVICE uint32_t signed_extreme(Extreme e) {
  if (e.positive >= kInf && e.negative >= kInf) return 0x7fc00000u;
  return e.positive >= e.negative ? e.positive : e.negative | 0x80000000u;
}

// fp32 bits -> 16 bits of the dtype, away from zero, so that no value of the block exceeds m. A
// value that has the dtype already stays as it is.
template <DType H>
HOST_DEVICE uint16_t away_from_zero(uint32_t bits) {
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude < kSmallest) return 0;
  if constexpr (H == DType::kBFloat16) {
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
template <DType H>
HOST_DEVICE float widen(uint16_t half) {
  if constexpr (H == DType::kBFloat16) {
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

// What values are multiplied with to encode them; NaN for a block that is inf or NaN as a whole.
template <int B>
HOST_DEVICE float inverse_step(float m) {
  if ((std::bit_cast<uint32_t>(m) & kInf) == kInf) return std::bit_cast<float>(0x7fc00000u);
  return m == 0.0f ? 0.0f : -static_cast<float>(1 << (B - 1)) / m;
}
// What codes are multiplied with to decode them.
template <int B>
HOST_DEVICE float step_of(float m) {
  return m * (-1.0f / static_cast<float>(1 << (B - 1)));
}

inline constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
inline constexpr uint32_t kRoundBits = 0x4b400000u;

// The code q + 2^(b-1) in the low bits, kRoundBits above it. One rounding, to the nearest integer,
// ties to even.
template <int B>
HOST_DEVICE uint32_t encode(float x, float inverse) {
  constexpr uint32_t kMost = kRoundBits + (1u << B) - 1;
  const auto bits = std::bit_cast<uint32_t>(fmaf(x, inverse, kRound + float{1 << (B - 1)}));
  return bits < kMost ? bits : kMost;
}

// Four values, a byte each. A block that is inf or NaN as a whole has no values: its codes are
// zeros, whose q times a step of inf or NaN is m again.
template <int B>
HOST_DEVICE uint32_t encode4(const float* x, float inverse) {
  constexpr uint32_t kConstant = kRoundBits * 0x01010101u;
  const uint32_t sum = encode<B>(x[0], inverse) + (encode<B>(x[1], inverse) << 8) +
                       (encode<B>(x[2], inverse) << 16) + (encode<B>(x[3], inverse) << 24);
  return inverse == inverse ? sum - kConstant : 0;
}

template <int B>
HOST_DEVICE void decode4(uint32_t codes, float step, float* x) {
  UNROLL
  for (int i = 0; i < 4; ++i) {
    // The integer in the low bits of 1.5 * 2^23 is that much more than it.
    const float shifted = std::bit_cast<float>(with_byte(kRoundBits, codes, i));
    x[i] = (shifted - (kRound + float{1 << (B - 1)})) * step;
  }
}

// 32 codes, a byte each, as B words and back. 6 bits are 4 and 2: the nibbles of two words share
// one, and the upper pairs of four.
template <int B>
HOST_DEVICE void pack(const uint32_t (&codes)[kBlock / 4], uint32_t (&words)[B]) {
  UNROLL
  for (int i = 0; i < B; ++i) {
    if constexpr (B == 8) {
      words[i] = codes[i];
    } else if (i < 4) {
      words[i] = (codes[2 * i] & 0x0f0f0f0fu) | (codes[2 * i + 1] & 0x0f0f0f0fu) << 4;
    } else {
      const uint32_t* four = codes + 4 * (i - 4);
      words[i] = (four[0] >> 4 & 0x03030303u) | (four[1] >> 2 & 0x0c0c0c0cu) |
                 (four[2] & 0x30303030u) | (four[3] << 2 & 0xc0c0c0c0u);
    }
  }
}

template <int B>
HOST_DEVICE void unpack(const uint32_t (&words)[B], uint32_t (&codes)[kBlock / 4]) {
  UNROLL
  for (int i = 0; i < kBlock / 4; ++i) {
    if constexpr (B == 8) {
      codes[i] = words[i];
    } else {
      codes[i] = words[i / 2] >> (i % 2 * 4) & 0x0f0f0f0fu;
      if constexpr (B == 6) {
        const uint32_t pairs = words[4 + i / 4];
        constexpr uint32_t kMask = 0x30303030u;
        codes[i] |= (i % 4 < 2 ? pairs << (4 - i % 4 * 2) : pairs >> (i % 4 * 2 - 4)) & kMask;
      }
    }
  }
}

// On the wire data is its own arrival flag (see prim/gpu_packet.h): a place at rest is zero, and no
// word that is sent, nor m, is zero. So codes and m travel inverted; zero then stands for words
// whose codes are all the largest, and for an m that no block has. A message with such a word says
// so by an m of 0xfff0 + n, a NaN: word n, the first of them, carries the true m in its upper half,
// below it a bit that is set, and a bit for each of the others.
inline constexpr uint32_t kAbsent = 0;
inline constexpr uint16_t kSpecial = 0xfff0;

template <int N>
HOST_DEVICE uint16_t seal(uint32_t (&words)[N], uint16_t m) {
  static_assert(N <= 8);
  bool special = false;
  UNROLL
  for (int i = 0; i < N; ++i) {
    words[i] = ~words[i];
    special = special || words[i] == kAbsent;
  }
  uint16_t sent = m;
  if (special) [[unlikely]] {
    int first = N;
    uint32_t others = 0;
    UNROLL
    for (int i = N - 1; i >= 0; --i) {
      if (words[i] != kAbsent) continue;
      if (first < N) others |= 1u << first;
      first = i;
    }
    UNROLL
    for (int i = 0; i < N; ++i) {
      if (words[i] == kAbsent) words[i] = i == first ? uint32_t{m} << 16 | 0x100u | others : 1u;
    }
    sent = static_cast<uint16_t>(kSpecial + first);
  }
  return static_cast<uint16_t>(~sent);
}

template <int N>
HOST_DEVICE uint16_t unseal(uint32_t (&words)[N], uint16_t sent) {
  auto m = static_cast<uint16_t>(~sent);
  if ((m & 0xfff8u) == kSpecial) [[unlikely]] {
    const int first = m & 7;
    uint32_t content = 0;
    UNROLL
    for (int i = 0; i < N; ++i) content = i == first ? words[i] : content;
    UNROLL
    for (int i = 0; i < N; ++i) {
      if (i == first || (content >> i & 1u) != 0) words[i] = kAbsent;
    }
    m = static_cast<uint16_t>(content >> 16);
  }
  UNROLL
  for (int i = 0; i < N; ++i) words[i] = ~words[i];
  return m;
}

}  // namespace quick
