// One 16-byte step of a head's rotation on the GPU, shared by rotary_embedding and the fused MLA
// cache write.
#pragma once

#include "prim/gpu_floats.h"

namespace elementwise {

// Pairs a step rotates: a vector of first halves and one of second halves, or a vector of pairs.
template <class T, bool kNeox>
inline constexpr int kPairs = kNeox ? gpu::kVec<T> : gpu::kVec<T> / 2;

// kP cosines and sines as the cache holds them: they become fp32 when they are used.
template <class C, int kP>
struct Angles {
  static constexpr int kPart = kP < gpu::kVec<C> ? kP : gpu::kVec<C>, kParts = kP / kPart;
  using Part = gpu::Vec<C, kPart>;
  gpu::Kept<Part> cos[kParts], sin[kParts];

  // n of them from a row of the cache.
  template <bool kAligned>
  __device__ void load(const C* row, int first, int half, int n) {
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      gpu::load<kAligned>(cos[p], row + first + p * kPart, n - p * kPart);
      gpu::load<kAligned>(sin[p], row + half + first + p * kPart, n - p * kPart);
    }
  }
  __device__ gpu::Vec<C, kP> cosines() const { return joined(cos); }
  __device__ gpu::Vec<C, kP> sines() const { return joined(sin); }

 private:
  __device__ static gpu::Vec<C, kP> joined(const gpu::Kept<Part> (&parts)[kParts]) {
    gpu::Vec<C, kP> all;
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const Part part = parts[p].get();
#pragma unroll
      for (int j = 0; j < kPart; ++j) all.at[p * kPart + j] = part.at[j];
    }
    return all;
  }
};

// kOnce: with the hints for memory that is touched once.
template <class T, bool kNeox, bool kOnce = true>
struct RotaryStep {
  static constexpr int kN = gpu::kVec<T>, kP = kPairs<T, kNeox>;
  gpu::Kept<gpu::Vec<T, kN>> x, y;  // y: second halves (neox only)

  // p points at the first rotated element of the head; `first` is the first pair, `n` of them.
  template <bool kAligned>
  __device__ void load(const T* p, int first, int half, int n) {
    if constexpr (kNeox) {
      load_vec<kAligned>(x, p + first, n);
      load_vec<kAligned>(y, p + half + first, n);
    } else {
      load_vec<kAligned>(x, p + 2 * first, 2 * n);
    }
  }
  template <bool kAligned>
  __device__ void store(T* p, int first, int half, int n) const {
    if constexpr (kNeox) {
      store_vec<kAligned>(p + first, x, n);
      store_vec<kAligned>(p + half + first, y, n);
    } else {
      store_vec<kAligned>(p + 2 * first, x, 2 * n);
    }
  }
  template <class C>
  __device__ void rotate(const Angles<C, kP>& angles, float sign) {
    const gpu::Vec<C, kP> cosines = angles.cosines(), sines = angles.sines();
    gpu::Vec<T, kN> p = x.get(), q;
    if constexpr (kNeox) q = y.get();
#pragma unroll
    for (int j = 0; j < kP; j += 2) {
      const float2 cos = gpu::pair_at(cosines, j), unsigned_sin = gpu::pair_at(sines, j);
      const float2 sin = {sign * unsigned_sin.x, sign * unsigned_sin.y};
      if constexpr (kNeox) {
        const float2 a = gpu::pair_at(p, j), b = gpu::pair_at(q, j);
        gpu::set_pair(p, j, {a.x * cos.x - b.x * sin.x, a.y * cos.y - b.y * sin.y});
        gpu::set_pair(q, j, {b.x * cos.x + a.x * sin.x, b.y * cos.y + a.y * sin.y});
      } else {
        const float2 a = gpu::pair_at(p, 2 * j), b = gpu::pair_at(p, 2 * j + 2);
        gpu::set_pair(p, 2 * j, {a.x * cos.x - a.y * sin.x, a.y * cos.x + a.x * sin.x});
        gpu::set_pair(p, 2 * j + 2, {b.x * cos.y - b.y * sin.y, b.y * cos.y + b.x * sin.y});
      }
    }
    x = p;
    if constexpr (kNeox) y = q;
  }

 private:
  using Kept = gpu::Kept<gpu::Vec<T, kN>>;
  template <bool kAligned>
  __device__ static void load_vec(Kept& v, const T* p, int n) {
    kOnce ? gpu::load_once<kAligned>(v, p, n) : gpu::load<kAligned>(v, p, n);
  }
  template <bool kAligned>
  __device__ static void store_vec(T* p, const Kept& v, int n) {
    kOnce ? gpu::store_once<kAligned>(p, v.get(), n) : gpu::store<kAligned>(p, v.get(), n);
  }
};

}  // namespace elementwise
