// Elementary functions in fp32 as straight-line code that vectorises, with relative errors of about
// 2e-7: far under the fp32 tolerance of the ops (1e-5), and the same bits on every machine that
// contracts multiply-adds alike.
#pragma once

#include <cstdint>

#include "prim/cpu_floats.h"

namespace cpu {

// e^x: x = n ln2 + r with |r| <= ln2 / 2, a polynomial in r, times 2^n in two factors so that
// overflow gives inf and underflow 0. Coefficients of Cephes' expf (S. Moshier).
ALWAYS_INLINE float exp(float x) {
  x = x > 90.0f ? 90.0f : x;
  x = x < -105.0f ? -105.0f : x;  // the comparisons leave a NaN as it is
  constexpr float kRound = 0x1.8p23f;
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const int32_t exponent = static_cast<int32_t>(bits_of(shifted) - bits_of(kRound));
  const int32_t half = exponent >> 1;
  const float first = float_of(static_cast<uint32_t>(half + 127) << 23);
  const float second = float_of(static_cast<uint32_t>(exponent - half + 127) << 23);
  return p * first * second;
}

ALWAYS_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }
ALWAYS_INLINE float silu(float x) { return x / (1.0f + exp(-x)); }

// 0.5 erfc(z) for z >= 0: W. Press et al., Numerical Recipes, erfcc; relative error 1.2e-7.
ALWAYS_INLINE float half_erfc(float z) {
  const float t = 1.0f / (1.0f + 0.5f * z);
  float p = 0.17087277f;
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  return 0.5f * t * exp(p - z * z);
}

// x Phi(x). The tail comes from erfc, so that large negative x keep their relative accuracy.
ALWAYS_INLINE float gelu(float x) {
  const float z = float_of(bits_of(x) & 0x7fffffffu) * 0.70710678f;
  const float tail = half_erfc(z);
  return x * (x > 0.0f ? 1.0f - tail : tail);
}

// 0.5 x (1 + tanh u) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3).
ALWAYS_INLINE float gelu_tanh(float x) {
  const float u2 = 1.59576912f * (x + 0.044715f * x * x * x);
  return x / (1.0f + exp(-u2));
}

}  // namespace cpu
