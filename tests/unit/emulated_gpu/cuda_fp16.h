// The 16-bit types as far as the emulated kernels use them.
#pragma once
#include <bit>

#include "prim/gpu.h"
struct __half {
  uint16_t bits;
};
struct __half2 {
  uint32_t bits;
};
struct float2 {
  float x, y;
};
inline float2 __half22float2(__half2 pair) {
  return {static_cast<float>(std::bit_cast<_Float16>(static_cast<uint16_t>(pair.bits))),
          static_cast<float>(std::bit_cast<_Float16>(static_cast<uint16_t>(pair.bits >> 16)))};
}
inline __half2 __floats2half2_rn(float low, float high) {
  const uint32_t a = std::bit_cast<uint16_t>(static_cast<_Float16>(low));
  const uint32_t b = std::bit_cast<uint16_t>(static_cast<_Float16>(high));
  return {a | b << 16};
}
