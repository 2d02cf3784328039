#pragma once
#include "prim/gpu.h"
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  uint32_t bits;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float, float) {
  throw std::logic_error("bf16 is not emulated");
}
