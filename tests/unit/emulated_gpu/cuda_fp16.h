// The 16-bit types by name alone: the emulated kernels run in fp32.
#pragma once
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
inline float2 __half22float2(__half2) { throw std::logic_error("fp16 is not emulated"); }
inline __half2 __floats2half2_rn(float, float) { throw std::logic_error("fp16 is not emulated"); }
