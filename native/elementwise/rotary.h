// One head's rotation on the CPU, shared by rotary_embedding and the fused MLA cache write.
#pragma once

#include <cstdint>

#include "prim/cpu_dispatch.h"
#include "prim/cpu_floats.h"

namespace elementwise {
namespace {

// head points at the first rotated element; cos and sin hold rot / 2 fp32 values each.
template <class T>
VECTORISED void rotate_neox(T* __restrict head, const float* __restrict cos,
                            const float* __restrict sin, int64_t half) {
  T* __restrict second = head + half;
  for (int64_t k = 0; k < half; ++k) {
    const float x = cpu::to_float(head[k]), y = cpu::to_float(second[k]);
    head[k] = cpu::from_float<T>(x * cos[k] - y * sin[k]);
    second[k] = cpu::from_float<T>(y * cos[k] + x * sin[k]);
  }
}

template <class T>
VECTORISED void rotate_pairs(T* __restrict head, const float* __restrict cos,
                             const float* __restrict sin, int64_t half) {
  for (int64_t k = 0; k < half; ++k) {
    const float x = cpu::to_float(head[2 * k]), y = cpu::to_float(head[2 * k + 1]);
    head[2 * k] = cpu::from_float<T>(x * cos[k] - y * sin[k]);
    head[2 * k + 1] = cpu::from_float<T>(y * cos[k] + x * sin[k]);
  }
}

template <class T>
void rotate(T* head, const float* cos, const float* sin, int64_t half, bool neox) {
  neox ? rotate_neox(head, cos, sin, half) : rotate_pairs(head, cos, sin, half);
}

// A row of the cos-sin cache in fp32: half cosines, then half sines.
template <class C>
VECTORISED void load_angles(float* __restrict out, const C* __restrict row, int64_t half,
                            float sign) {
  for (int64_t k = 0; k < half; ++k) out[k] = cpu::to_float(row[k]);
  for (int64_t k = 0; k < half; ++k) out[half + k] = sign * cpu::to_float(row[half + k]);
}

}  // namespace
}  // namespace elementwise
