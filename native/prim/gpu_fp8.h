// The OCP 8-bit formats on the GPU: to and from floats, bit for bit as torch converts them.
#pragma once

#include <cuda_fp8.h>

#include "prim/gpu_floats.h"

namespace gpu {

// The division of fp8 quantization, with the reciprocal taken once. One Newton step on the product
// gives the rounded quotient (P. Markstein, 1990); infinities and overflow keep the product.
class Divisor {
 public:
  // A kernel with a scale in device memory takes the reciprocal itself; for a number that the host
  // knows the host does.
  __host__ __device__ explicit Divisor(float scale)
      : scale_(scale), inverse_(reciprocal(scale)), limit_(1e30f * scale) {}

  __device__ float quotient(float x) const {
    const float q = x * inverse_;
    return fabsf(q) < 1e30f ? small_quotient(x) : q;
  }
  // The same for |x| below the limit; this way round a zero keeps its sign.
  __device__ float small_quotient(float x) const {
    const float q = x * inverse_;
    return fmaf(-inverse_, fmaf(q, scale_, -x), q);
  }
  __device__ float product(float x) const { return x * inverse_; }
  // Whether all elements are below the limit: no infinity, no NaN, no negative scale, nothing to
  // guard.
  template <class T, int kCount>
  __device__ bool all_small(const Vec<T, kCount>& v) const {
    uint32_t words[kCount / 2];
    memcpy(words, &v, kCount * 2);
    if constexpr (std::is_same_v<T, BFloat16>) {
      const uint32_t bits = __float_as_uint(limit_);
      return largest_below<__nv_bfloat162>(words, __byte_perm(bits, 0, 0x3232));
    } else {
      const __half2 limit = __half2half2(__float2half_rd(limit_));
      return largest_below<__half2>(words, reinterpret_cast<const uint32_t&>(limit));
    }
  }
  // The signs of four dividends over the scale, each as the top bit of a byte.
  __device__ uint32_t signs(float a, float b, float c, float d) const {
    const uint32_t low = __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x0073);
    const uint32_t high = __byte_perm(__float_as_uint(c), __float_as_uint(d), 0x0073);
    const uint32_t flip = (__float_as_uint(scale_) >> 31) * 0x80808080u;
    return (__byte_perm(low, high, 0x5410) ^ flip) & 0x80808080u;
  }

 private:
  // 1 / x, rounded as a division is; the general division is long.
  __host__ __device__ static float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
    if (fabsf(x) > 1e-30f && fabsf(x) < 1e30f) {
      const float y = reciprocal_approx(x);
      return fmaf(fmaf(-x, y, 1.0f), y, y);
    }
#endif
    return 1.0f / x;
  }
  // Whether the largest magnitudes in even and odd places are below two limits; a NaN is not.
  template <class Pair, int kWords>
  __device__ static bool largest_below(const uint32_t (&words)[kWords], uint32_t limits) {
    Pair most = __habs2(reinterpret_cast<const Pair&>(words[0]));
#pragma unroll
    for (int i = 1; i < kWords; ++i) {
      most = __hmax2_nan(most, __habs2(reinterpret_cast<const Pair&>(words[i])));
    }
    return __hblt2(most, reinterpret_cast<const Pair&>(limits));
  }

  float scale_, inverse_, limit_;
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

// The same of a vector of elements.
template <KvFormat kFormat, class T, int kCount>
__device__ inline void quantize_guarded(Vec<uint8_t, kCount>& out, const Vec<T, kCount>& v,
                                        const Divisor& divisor) {
  float x[kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j) x[j] = to_float(v.at[j]);
  quantize<kFormat>(out, x, divisor);
}

// Infinities, NaNs and numbers of that kind, out of the way of the others.
template <KvFormat kFormat, class T>
GPU_COLD uint2 quantize_rare(uint4 v, Divisor divisor) {
  Vec<uint8_t, 8> codes;
  quantize_guarded<kFormat>(codes, std::bit_cast<Vec<T, 8>>(v), divisor);
  return std::bit_cast<uint2>(codes);
}

// 16-bit elements are hardly ever too large to be divided without care. kPowerOfTwo: the scale is
// one, and its reciprocal exact.
template <KvFormat kFormat, bool kPowerOfTwo = false, class T, int kCount>
__device__ inline void quantize(Vec<uint8_t, kCount>& out, const Vec<T, kCount>& v,
                                const Divisor& divisor) {
  if constexpr (sizeof(T) == 2 && kCount == 8) {
    if (!divisor.all_small(v)) {
      out = std::bit_cast<Vec<uint8_t, 8>>(
          quantize_rare<kFormat, T>(std::bit_cast<uint4>(v), divisor));
      return;
    }
    auto codes_of = [&](float2 x) {
      return kPowerOfTwo
                 ? to_fp8x2<kFormat>(divisor.product(x.x), divisor.product(x.y))
                 : to_fp8x2<kFormat>(divisor.small_quotient(x.x), divisor.small_quotient(x.y));
    };
    uint32_t words[2];
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      words[i / 4] = __byte_perm(codes_of(pair_at(v, i)), codes_of(pair_at(v, i + 2)), 0x5410);
    }
    memcpy(&out, words, kCount);
  } else {
    quantize_guarded<kFormat>(out, v, divisor);
  }
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
      set_pair(out, i + 2 * j, {f.x * scale, f.y * scale});
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

// 2^ceil(log2(x)) of a positive normal x: any mantissa bit carries into the exponent.
__device__ inline float power_of_two_at_least(float x) {
  return __uint_as_float((__float_as_uint(x) + 0x7fffffu) & 0x7f800000u);
}

}  // namespace gpu
