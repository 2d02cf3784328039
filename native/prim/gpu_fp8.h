// The OCP 8-bit formats on the GPU: to and from floats, bit for bit as torch converts them.
#pragma once

#include <cuda_fp8.h>

#include "prim/gpu_floats.h"

namespace gpu {

// Four codes in a word, rounded to nearest even and saturated; a NaN becomes 0x7f.
template <KvFormat kFormat>
__device__ inline uint32_t to_fp8x4(float a, float b, float c, float d) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint32_t codes;
  if constexpr (kFormat == KvFormat::kE5M2) {
    asm("{.reg .b16 l, h; cvt.rn.satfinite.e5m2x2.f32 l, %2, %1;"
        " cvt.rn.satfinite.e5m2x2.f32 h, %4, %3; mov.b32 %0, {l, h};}"
        : "=r"(codes)
        : "f"(a), "f"(b), "f"(c), "f"(d));
  } else {
    asm("{.reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, %2, %1;"
        " cvt.rn.satfinite.e4m3x2.f32 h, %4, %3; mov.b32 %0, {l, h};}"
        : "=r"(codes)
        : "f"(a), "f"(b), "f"(c), "f"(d));
  }
  return codes;
#else
  constexpr __nv_fp8_interpretation_t kKind = kFormat == KvFormat::kE5M2 ? __NV_E5M2 : __NV_E4M3;
  return __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, kKind) |
         __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, kKind) << 16;
#endif
}

// The division of fp8 quantization, with the reciprocal taken once. One Newton step on the product
// gives the rounded quotient (P. Markstein, 1990) as long as neither overflows; what is left is
// divided.
class Divisor {
 public:
  __device__ explicit Divisor(float scale)
      : Divisor(scale, reciprocal(scale), is_ordinary(fabsf(scale)) ? 1e30f : 0.0f) {}

  __device__ float quotient(float x) const {
    return fabsf(x * inverse_) < limit_ ? small_quotient(x) : x / scale_;
  }
  // For an ordinary scale and a quotient below 1e30. This way round a zero keeps its sign.
  __device__ float small_quotient(float x) const {
    const float q = x * inverse_;
    return fmaf(-inverse_, fmaf(q, scale_, -x), q);
  }
  __device__ float product(float x) const { return x * inverse_; }
  // What the signs of four dividends, each the top bit of a byte, differ in from the quotients'.
  __device__ uint32_t flipped_signs() const {
    return (__float_as_uint(scale_) >> 31) * 0x80808080u;
  }

  __device__ float scale() const { return scale_; }
  __device__ bool ordinary() const { return is_ordinary(scale_); }
  // The same for the mantissa of an ordinary scale.
  __device__ Divisor of_mantissa() const {
    const float power = __uint_as_float(__float_as_uint(scale_) & 0x7f800000u);
    const uint32_t mantissa = __float_as_uint(scale_) & 0x7fffffu;
    return {__uint_as_float(mantissa | 0x3f800000u), inverse_ * power, limit_};
  }

 private:
  __device__ Divisor(float scale, float inverse, float limit)
      : scale_(scale), inverse_(inverse), limit_(limit) {}

  // Far enough from both ends of fp32 for the reciprocal.
  __device__ static bool is_ordinary(float scale) { return scale > 1e-30f && scale < 1e30f; }
  // 1 / x, rounded as a division is; the general division is long.
  __device__ static float reciprocal(float x) {
    if (!is_ordinary(fabsf(x))) return 1.0f / x;
    const float y = reciprocal_approx(x);
    return fmaf(fmaf(-x, y, 1.0f), y, y);
  }

  float scale_, inverse_, limit_;
};

// The signs of four elements, which lie in one word or two or four, as the top bits of four bytes.
// Of the elements' own bits: a half that is NaN loses its sign on the way to a float.
template <class T>
__device__ inline uint32_t top_bits(const uint32_t* words) {
  if constexpr (sizeof(T) == 2) {
    return __byte_perm(words[0], words[1], 0x7531);
  } else {
    return __byte_perm(__byte_perm(words[0], words[1], 0x0073),
                       __byte_perm(words[2], words[3], 0x0073), 0x5410);
  }
}

// Codes of kCount elements (a multiple of 4) over a scale; the sign of a NaN is kept. They stay in
// words until they are stored: apart, as bytes, they would take an instruction or two each.
template <KvFormat kFormat, class T, int kCount, class Quotient>
__device__ inline Kept<Vec<uint8_t, kCount>> quantized_with(const Kept<Vec<T, kCount>>& v,
                                                            uint32_t flipped_signs,
                                                            const Quotient& quotient) {
  static_assert(kCount % 4 == 0);
  const Vec<T, kCount> values = v.get();
  uint32_t in[kCount * sizeof(T) / 4], words[kCount / 4];
  memcpy(in, &v.raw, sizeof(in));
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const float2 a = pair_at(values, i), b = pair_at(values, i + 2);
    words[i / 4] = to_fp8x4<kFormat>(quotient(a.x), quotient(a.y), quotient(b.x), quotient(b.y)) |
                   ((top_bits<T>(in + i * sizeof(T) / 4) ^ flipped_signs) & 0x80808080u);
  }
  Kept<Vec<uint8_t, kCount>> codes;
  memcpy(&codes.raw, words, kCount);
  return codes;
}

template <KvFormat kFormat, class T, int kCount>
__device__ inline Kept<Vec<uint8_t, kCount>> quantized(const Kept<Vec<T, kCount>>& v,
                                                       const Divisor& divisor) {
  return quantized_with<kFormat>(v, divisor.flipped_signs(),
                                 [&](float x) { return divisor.quotient(x); });
}

// The same by the product: for a positive scale whose product suffices or that is a power of two.
// All of it without a branch: infinities saturate, and a NaN (0x7f) gets its sign like every other
// number.
template <KvFormat kFormat, class T, int kCount>
__device__ inline Kept<Vec<uint8_t, kCount>> quantized_by_product(const Kept<Vec<T, kCount>>& v,
                                                                  const Divisor& divisor) {
  return quantized_with<kFormat>(v, 0, [&](float x) { return divisor.product(x); });
}

// Whether the product has the code of the rounded quotient for every 16-bit T, for either of two
// divisors. Both are within 2^-23 of the quotient, so their codes can differ only if an edge
// between two codes is as near: if a T is as near to scale times the edge. Edges are the odd
// numbers below 32 times powers of two; half a warp tries the T that are nearest to them, where the
// codes are wide apart. (The powers make no difference, except that all of the 16 are edges at the
// smallest normal codes and below.) To be called by whole warps, all lanes with the same scales.
struct Suffices {
  bool first, second;
};
template <KvFormat kFormat, class T>
__device__ inline Suffices product_suffices(const Divisor& first, const Divisor& second) {
  constexpr float kSmallest = kFormat == KvFormat::kE5M2 ? 0x1p-17f : 0x1p-10f;
  const uint32_t lane = threadIdx.x % 32;
  const Divisor divisor = lane < 16 ? first : second, unit = divisor.of_mantissa();
  const float edge = unit.scale() * static_cast<float>(2 * (lane % 16) + 1);
  const float x = to_float(from_float<T>(edge));
  const float exact = unit.small_quotient(x) * kSmallest;
  const float product = unit.product(x) * kSmallest;
  const uint32_t codes = to_fp8x4<kFormat>(exact, exact, product, product);
  const uint32_t agree = __ballot_sync(~0u, divisor.ordinary() && codes >> 16 == (codes & 0xffffu));
  return {(agree & 0xffffu) == 0xffffu, agree >> 16 == 0xffffu};
}

// What a cache of kFormat holds of elements of type T: they themselves, or codes.
template <KvFormat kFormat, class T>
class Quantizer {
 public:
  using Item = uint8_t;

  // For any scale; divides exactly.
  __device__ explicit Quantizer(float scale) : divisor_(scale) {}
  // For two scales. With whole_warps each warp comes here as a whole, all lanes with the same two:
  // most scales are then found to need no exact division.
  struct Two {
    Quantizer first, second;
  };
  __device__ static Two for_warps(float first, float second, bool whole_warps = true) {
    Two two = {Quantizer(first), Quantizer(second)};
    if (sizeof(T) == 2 && whole_warps) {
      const Suffices by_product =
          product_suffices<kFormat, T>(two.first.divisor_, two.second.divisor_);
      two.first.by_product_ = by_product.first, two.second.by_product_ = by_product.second;
    }
    return two;
  }
  __device__ static Quantizer for_warps(float scale) { return for_warps(scale, scale).first; }

  template <int kCount>
  __device__ Kept<Vec<uint8_t, kCount>> operator()(const Kept<Vec<T, kCount>>& v) const {
    if constexpr (sizeof(T) == 2 && kCount == 8) {
      return by_product_ ? quantized_by_product<kFormat>(v, divisor_)
                         : slow(v.raw, divisor_.scale());
    } else {
      return quantized<kFormat>(v, divisor_);
    }
  }

 private:
  // Out of the way of the others, and with few registers of theirs.
  GPU_COLD static Kept<Vec<uint8_t, 8>> slow(uint4 raw, float scale) {
    Kept<Vec<T, 8>> v;
    v.raw = raw;
    return quantized<kFormat>(v, Divisor(scale));
  }

  Divisor divisor_;
  bool by_product_ = false;
};

template <class T>
class Quantizer<KvFormat::kCopy, T> {
 public:
  using Item = T;
  struct Two {
    Quantizer first, second;
  };
  __device__ explicit Quantizer(float) {}
  __device__ static Two for_warps(float, float, bool = true) {
    return {Quantizer(1.0f), Quantizer(1.0f)};
  }
  __device__ static Quantizer for_warps(float) { return Quantizer(1.0f); }
  template <int kCount>
  __device__ Kept<Vec<T, kCount>> operator()(const Kept<Vec<T, kCount>>& v) const {
    return v;
  }
};

template <KvFormat kFormat, class T>
using CacheItem = typename Quantizer<kFormat, T>::Item;

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
