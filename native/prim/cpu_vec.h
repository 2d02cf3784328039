// 16-bit floats in plain C++ that the compiler vectorises: bit arithmetic and selects, no branches.
//
// Conversions from fp32 round to nearest, ties to even; infinities and NaN stay what they are,
// subnormal halves are exact, also where the thread flushes subnormal fp32.
#pragma once

#include <cstdint>
#include <cstring>

namespace prim {

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(BFloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }

inline float to_float(Float16 x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t exponent = magnitude & 0x0f800000u;
  uint32_t rebased = magnitude + (112u << 23);           // exponent bias 15 -> 127
  rebased += exponent == 0x0f800000u ? 112u << 23 : 0u;  // infinity, NaN: 31 -> 255
  // A subnormal m * 2^-24 is (2^-14 + m * 2^-24) - 2^-14, both normal in fp32.
  const float subnormal = bit_cast<float>(rebased + (1u << 23)) - bit_cast<float>(113u << 23);
  const uint32_t value = exponent == 0 ? bit_cast<uint32_t>(subnormal) : rebased;
  return bit_cast<float>(value | sign);
}

inline void from_float(float x, float& out) { out = x; }

inline void from_float(float x, BFloat16& out) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out.bits = static_cast<uint16_t>(nan ? bits >> 16 | 0x40u : rounded);
}

inline void from_float(float x, Float16& out) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = bits & 0x80000000u;
  const uint32_t magnitude = bits ^ sign;
  // Normal result: rebase the exponent and add just under half a unit, and one more if odd.
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // Subnormal result: adding 0.5 makes the adder round at 2^-24.
  const uint32_t half = 126u << 23;
  const uint32_t subnormal =
      bit_cast<uint32_t>(bit_cast<float>(magnitude) + bit_cast<float>(half)) - half;
  uint32_t value = magnitude < 113u << 23 ? subnormal : normal;
  value = magnitude >= 143u << 23 ? 0x7c00u : value;  // 2^16 and more: infinity
  value = magnitude > 0x7f800000u ? 0x7e00u : value;  // NaN
  out.bits = static_cast<uint16_t>(value | sign >> 16);
}

}  // namespace prim
