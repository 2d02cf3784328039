// Elements and 16-byte vectors on the GPU: conversions to and from fp32 and the OCP 8-bit formats,
// and loads and stores that fall back to single elements where an address is not aligned.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "prim/dtype.h"
#include "prim/gpu.h"

namespace gpu {

using BFloat16 = __nv_bfloat16;
using Half = __half;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(Half x) { return __half2float(x); }
__device__ inline float to_float(BFloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline Half from_float<Half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline BFloat16 from_float<BFloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <class T>
inline constexpr int kVec = 16 / sizeof(T);  // elements of 16 bytes

// kCount elements, moved as one access of up to 16 bytes.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount > 16 ? 16 : sizeof(T) * kCount) Vec {
  T at[kCount];
};

// Loads `count` (1 to kCount) elements; kAligned promises a full vector at an aligned address.
template <bool kAligned, class T, int kCount>
__device__ inline void load(Vec<T, kCount>& v, const T* p, int count = kCount) {
  if constexpr (kAligned) {
    v = *reinterpret_cast<const Vec<T, kCount>*>(p);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v.at[i] = i < count ? p[i] : T{};
  }
}

template <bool kAligned, class T, int kCount>
__device__ inline void store(T* p, const Vec<T, kCount>& v, int count = kCount) {
  if constexpr (kAligned) {
    *reinterpret_cast<Vec<T, kCount>*>(p) = v;
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < count) p[i] = v.at[i];
    }
  }
}

// The division of fp8 quantization, with the reciprocal taken once. One Newton step on the product
// gives the rounded quotient (P. Markstein, 1990); infinities and overflow keep the product.
class Divisor {
 public:
  __device__ explicit Divisor(float scale) {
    scale_ = scale;
    inverse_ = 1.0f / scale;
    flip_ = (__float_as_uint(scale) >> 31) * 0x80808080u;
  }
  __device__ float quotient(float x) const {
    const float q = x * inverse_;
    const float corrected = fmaf(fmaf(-q, scale_, x), inverse_, q);
    return fabsf(q) < 1e30f ? corrected : q;
  }
  // The signs of four dividends over the scale, each as the top bit of a byte.
  __device__ uint32_t signs(float a, float b, float c, float d) const {
    const uint32_t low = __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x0073);
    const uint32_t high = __byte_perm(__float_as_uint(c), __float_as_uint(d), 0x0073);
    return (__byte_perm(low, high, 0x5410) ^ flip_) & 0x80808080u;
  }

 private:
  float scale_, inverse_;
  uint32_t flip_;
};

// Two codes in the low 16 bits, rounded to nearest even and saturated; a NaN becomes 0x7f.
template <KvFormat kFormat>
__device__ inline uint32_t to_fp8x2(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t codes;
  if constexpr (kFormat == KvFormat::kE5M2) {
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(b), "f"(a));
  } else {
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(b), "f"(a));
  }
  return codes;
#else
  constexpr __nv_fp8_interpretation_t kKind = kFormat == KvFormat::kE5M2 ? __NV_E5M2 : __NV_E4M3;
  return __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, kKind);
#endif
}

// Codes of kCount floats (a multiple of 4) over a scale; the sign of a NaN is kept.
template <KvFormat kFormat, int kCount>
__device__ inline void quantize(Vec<uint8_t, kCount>& out, const float (&x)[kCount],
                                const Divisor& divisor) {
  static_assert(kCount % 4 == 0);
  uint32_t words[kCount / 4];
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const uint32_t low = to_fp8x2<kFormat>(divisor.quotient(x[i]), divisor.quotient(x[i + 1]));
    const uint32_t high = to_fp8x2<kFormat>(divisor.quotient(x[i + 2]), divisor.quotient(x[i + 3]));
    words[i / 4] =
        __byte_perm(low, high, 0x5410) | divisor.signs(x[i], x[i + 1], x[i + 2], x[i + 3]);
  }
  memcpy(&out, words, kCount);
}

// Four codes to two pairs of fp16, exactly.
template <KvFormat kFormat>
__device__ inline void from_fp8x4(uint32_t codes, uint32_t& low, uint32_t& high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  if constexpr (kFormat == KvFormat::kE5M2) {
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e5m2x2 %0, l;"
        " cvt.rn.f16x2.e5m2x2 %1, h;}"
        : "=r"(low), "=r"(high)
        : "r"(codes));
  } else {
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e4m3x2 %0, l;"
        " cvt.rn.f16x2.e4m3x2 %1, h;}"
        : "=r"(low), "=r"(high)
        : "r"(codes));
  }
#else
  constexpr __nv_fp8_interpretation_t kKind = kFormat == KvFormat::kE5M2 ? __NV_E5M2 : __NV_E4M3;
  const __half2_raw l =
      __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(codes & 0xffff), kKind);
  const __half2_raw h =
      __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(codes >> 16), kKind);
  memcpy(&low, &l, 4);
  memcpy(&high, &h, 4);
#endif
}

template <KvFormat kFormat, class T, int kCount>
__device__ inline void dequantize(Vec<T, kCount>& out, const Vec<uint8_t, kCount>& codes,
                                  float scale) {
  static_assert(kCount % 4 == 0);
  uint32_t words[kCount / 4];
  memcpy(words, &codes, kCount);
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    uint32_t pairs[2];
    from_fp8x4<kFormat>(words[i / 4], pairs[0], pairs[1]);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      __half2 h;
      memcpy(&h, &pairs[j], 4);
      const float2 f = __half22float2(h);
      out.at[i + 2 * j] = from_float<T>(f.x * scale);
      out.at[i + 2 * j + 1] = from_float<T>(f.y * scale);
    }
  }
}

// One code as fp32, exactly.
template <KvFormat kFormat>
__device__ inline float from_fp8(uint8_t code) {
  uint32_t low, high;
  from_fp8x4<kFormat>(code, low, high);
  __half2 h;
  memcpy(&h, &low, 4);
  return __low2float(h);
}

// 2^x to 2 units in the last place.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// a / b rounded as a division is, for 1 <= b (what a logistic function divides by).
__device__ inline float divide_by_at_least_one(float a, float b) {
  if (b > 1e30f) return a / b;
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(b));
  y = fmaf(fmaf(-b, y, 1.0f), y, y);
  float q = a * y;
  q = fmaf(fmaf(-b, q, a), y, q);
  // A quotient near the subnormals, or an infinite dividend, takes the long way.
  return fabsf(q) > 1e-30f && fabsf(q) < 1e30f ? fmaf(fmaf(-b, q, a), y, q) : a / b;
}

// A slot's block and offset. 64-bit division is slow; caches of over 2^32 entries still get it.
__device__ inline void split_slot(int64_t slot, int64_t block_size, int64_t& block, int64_t& off) {
  if (static_cast<uint64_t>(slot | block_size) >> 32 == 0) {
    const uint32_t b = static_cast<uint32_t>(slot) / static_cast<uint32_t>(block_size);
    block = b;
    off = static_cast<uint32_t>(slot) - b * static_cast<uint32_t>(block_size);
  } else {
    block = slot / block_size;
    off = slot - block * block_size;
  }
}

// 2^ceil(log2(x)) of a positive normal x: any mantissa bit carries into the exponent.
__device__ inline float power_of_two_at_least(float x) {
  return __uint_as_float((__float_as_uint(x) + 0x7fffffu) & 0x7f800000u);
}

// Calls f with a value of the element type of a float dtype.
template <class F>
void with_float(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat16:
      return f(Half{});
    default:
      return f(BFloat16{});
  }
}

template <KvFormat kFormat>
struct FormatTag {
  static constexpr KvFormat value = kFormat;
};
template <class F>
void with_format(KvFormat format, const F& f) {
  switch (format) {
    case KvFormat::kCopy:
      return f(FormatTag<KvFormat::kCopy>{});
    case KvFormat::kE4M3:
      return f(FormatTag<KvFormat::kE4M3>{});
    default:
      return f(FormatTag<KvFormat::kE5M2>{});
  }
}

template <bool kValue>
struct BoolTag {
  static constexpr bool value = kValue;
};
template <class F>
void with_bool(bool value, const F& f) {
  value ? f(BoolTag<true>{}) : f(BoolTag<false>{});
}

// Whether every address and byte stride is a multiple of `bytes`.
template <class... Values>
bool aligned(int64_t bytes, Values... values) {
  int64_t bits = 0;
  ((bits |= (int64_t)values), ...);
  return bits % bytes == 0;
}

inline gpu::Stream stream_of(::Stream stream) { return static_cast<gpu::Stream>(stream); }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace gpu
