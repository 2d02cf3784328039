#pragma once
#include <bit>

#include "prim/gpu.h"
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  uint32_t bits;
};
inline uint32_t rounded_to_bfloat16(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  return {rounded_to_bfloat16(low) | rounded_to_bfloat16(high) << 16};
}
