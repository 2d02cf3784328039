// Conversions between fp32 and the 16- and 8-bit formats, as integer code without branches: loops
// over them vectorise for every instruction set, and give the same bits on each. No fp32 subnormal
// is ever an operand, so the flush-to-zero mode of the processor makes no difference.
#pragma once

#include <bit>
#include <cstdint>

#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace cpu {

// 16-bit storage types, told apart by name; their arithmetic is in fp32.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

ALWAYS_INLINE constexpr uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }
ALWAYS_INLINE constexpr float float_of(uint32_t x) { return std::bit_cast<float>(x); }

ALWAYS_INLINE float to_float(float x) { return x; }
ALWAYS_INLINE float to_float(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
ALWAYS_INLINE float to_float(Half x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rebias = magnitude >= 0x7c00u ? (255u - 31u) << 23 : (127u - 15u) << 23;
  const uint32_t normal = (magnitude << 13) + rebias;
  const uint32_t subnormal =
      bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return float_of((magnitude < 0x400u ? subnormal : normal) | sign);
}

// fp32 to T, to nearest even.
template <class T>
ALWAYS_INLINE T from_float(float x);
template <>
ALWAYS_INLINE float from_float<float>(float x) {
  return x;
}
template <>
ALWAYS_INLINE BFloat16 from_float<BFloat16>(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(nan ? 0x7fc0u : rounded)};
}
template <>
ALWAYS_INLINE Half from_float<Half>(float x) {
  const uint32_t u = bits_of(x) & 0x7fffffffu;
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000u;
  const uint32_t normal = (u - ((127u - 15u) << 23) + 0xfffu + ((u >> 13) & 1u)) >> 13;
  // Adding 0.5 moves the half's last bit to the last bit of the fp32 sum, which rounds it.
  const uint32_t subnormal = bits_of(float_of(u) + 0.5f) - bits_of(0.5f);
  uint32_t h = u < (113u << 23) ? subnormal : normal;
  h = u >= (143u << 23) ? 0x7c00u : h;
  h = u > 0x7f800000u ? 0x7e00u : h;
  return {static_cast<uint16_t>(h | sign)};
}

// The OCP 8-bit formats (Open Compute Project, OFP8 1.0).
enum class Fp8 { kE4M3, kE5M2 };

// Rounds to nearest even and saturates, infinities too; a NaN becomes 0x7f, with its sign.
template <Fp8 kFormat>
ALWAYS_INLINE uint8_t to_fp8(float x) {
  constexpr bool kE4 = kFormat == Fp8::kE4M3;
  constexpr uint32_t kShift = kE4 ? 20 : 21;  // mantissa bits dropped
  constexpr uint32_t kBias = kE4 ? 7 : 15;
  constexpr uint32_t kLargest = kE4 ? 0x43e00000u : 0x47600000u;  // 448, 57344
  constexpr float kMagic = kE4 ? 0x1p14f : 0x1p7f;                // ulp: the last subnormal bit
  const uint32_t given = bits_of(x) & 0x7fffffffu;
  const uint32_t sign = (bits_of(x) >> 24) & 0x80u;
  const uint32_t u = given > kLargest ? kLargest : given;
  const uint32_t normal =
      (u - ((127u - kBias) << 23) + (1u << (kShift - 1)) - 1u + ((u >> kShift) & 1u)) >> kShift;
  const uint32_t subnormal = bits_of(float_of(u) + kMagic) - bits_of(kMagic);
  uint32_t code = u < ((128u - kBias) << 23) ? subnormal : normal;
  code = given > 0x7f800000u ? 0x7fu : code;
  return static_cast<uint8_t>(code | sign);
}

// Exact; e5m2's infinities and the NaNs of both formats become those of fp32.
template <Fp8 kFormat>
ALWAYS_INLINE constexpr float from_fp8(uint8_t code) {
  constexpr bool kE4 = kFormat == Fp8::kE4M3;
  constexpr uint32_t kShift = kE4 ? 20 : 21;
  constexpr uint32_t kBias = kE4 ? 7 : 15;
  const uint32_t magnitude = code & 0x7fu;
  const uint32_t sign = static_cast<uint32_t>(code & 0x80u) << 24;
  const uint32_t special = kE4 ? 0x7fu : 0x7cu;
  uint32_t u = (magnitude << kShift) + ((127u - kBias) << 23);
  const float subnormal =
      static_cast<float>(static_cast<int32_t>(magnitude)) * (kE4 ? 0x1p-9f : 0x1p-16f);
  u = magnitude < (kE4 ? 8u : 4u) ? bits_of(subnormal) : u;
  u = magnitude >= special ? (0x7f800000u | (magnitude << kShift)) : u;
  return float_of(u | sign);
}

}  // namespace cpu
