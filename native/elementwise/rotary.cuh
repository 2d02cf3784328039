// One 16-byte step of a head's rotation on the GPU, shared by rotary_embedding and the fused MLA
// cache write.
#pragma once

#include "prim/gpu_floats.h"

namespace elementwise {

// Pairs a step rotates: a vector of first halves and one of second halves, or a vector of pairs.
template <class T, bool kNeox>
inline constexpr int kPairs = kNeox ? gpu::kVec<T> : gpu::kVec<T> / 2;

template <class T, bool kNeox>
struct RotaryStep {
  static constexpr int kN = gpu::kVec<T>, kP = kPairs<T, kNeox>;
  gpu::Vec<T, kN> x, y;  // y: second halves (neox only)

  // p points at the first rotated element of the head; `first` is the first pair, `n` of them.
  template <bool kAligned>
  __device__ void load(const T* p, int first, int half, int n) {
    if constexpr (kNeox) {
      gpu::load<kAligned>(x, p + first, n);
      gpu::load<kAligned>(y, p + half + first, n);
    } else {
      gpu::load<kAligned>(x, p + 2 * first, 2 * n);
    }
  }
  template <bool kAligned>
  __device__ void store(T* p, int first, int half, int n) const {
    if constexpr (kNeox) {
      gpu::store<kAligned>(p + first, x, n);
      gpu::store<kAligned>(p + half + first, y, n);
    } else {
      gpu::store<kAligned>(p + 2 * first, x, 2 * n);
    }
  }
  __device__ void rotate(const float (&cos)[kP], const float (&sin)[kP]) {
#pragma unroll
    for (int j = 0; j < kP; ++j) {
      T& first = kNeox ? x.at[j] : x.at[2 * j % kN];
      T& second = kNeox ? y.at[j] : x.at[(2 * j + 1) % kN];
      const float a = gpu::to_float(first), b = gpu::to_float(second);
      first = gpu::from_float<T>(a * cos[j] - b * sin[j]);
      second = gpu::from_float<T>(b * cos[j] + a * sin[j]);
    }
  }
};

// n of kP cosines and sines from a row of the cache, as fp32.
template <bool kAligned, class C, int kP>
__device__ inline void load_angles(float (&cos)[kP], float (&sin)[kP], const C* row, int first,
                                   int half, int n, float sign) {
  if constexpr (kAligned && kP * sizeof(C) <= 16) {
    gpu::Vec<C, kP> c, s;
    gpu::load<true>(c, row + first);
    gpu::load<true>(s, row + half + first);
#pragma unroll
    for (int j = 0; j < kP; ++j) {
      cos[j] = gpu::to_float(c.at[j]);
      sin[j] = sign * gpu::to_float(s.at[j]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kP; ++j) {
      cos[j] = j < n ? gpu::to_float(row[first + j]) : 0.0f;
      sin[j] = j < n ? sign * gpu::to_float(row[half + first + j]) : 0.0f;
    }
  }
}

}  // namespace elementwise
