// Elements and 16-byte vectors on the GPU: conversions to and from fp32 and the OCP 8-bit formats,
// and loads and stores that fall back to single elements where an address is not aligned.
#pragma once

#include <cuda_fp8.h>

#include <bit>
#include <cstdint>
#include <type_traits>

#include "prim/dtype.h"
#include "prim/gpu_half.h"
#include "prim/gpu_launch.h"
#include "prim/gpu_memory.h"

namespace gpu {

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

// Two values rounded to a 16-bit T, in one word: the instruction that takes one value is slower
// than the one that takes two.
template <class T>
__device__ inline uint32_t rounded_word(float2 x) {
  static_assert(sizeof(T) == 2);
  return std::is_same_v<T, BFloat16> ? round_to_bfloat16s(x.x, x.y) : round_to_halves(x.x, x.y);
}

// Two values rounded to T, as floats.
template <class T>
__device__ inline float2 rounded(float2 x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t word = rounded_word<T>(x);
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  } else if constexpr (std::is_same_v<T, Half>) {
    return widen_halves(rounded_word<T>(x));
  } else {
    return x;
  }
}

template <class T>
inline constexpr int kVec = 16 / sizeof(T);  // elements of 16 bytes

// kCount elements, moved as one access of up to 16 bytes.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount > 16 ? 16 : sizeof(T) * kCount) Vec {
  T at[kCount];
};

// Elements i and i + 1 as floats, and rounded.
template <class T, int kCount>
__device__ inline float2 pair_at(const Vec<T, kCount>& v, int i) {
  return {to_float(v.at[i]), to_float(v.at[i + 1])};
}
template <class T, int kCount>
__device__ inline void set_pair(Vec<T, kCount>& v, int i, float2 x) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t word = rounded_word<T>(x);
    memcpy(&v.at[i], &word, 4);
  } else {
    v.at[i] = x.x, v.at[i + 1] = x.y;
  }
}

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

// A vector that waits for its use in whole registers: its 16-bit or 8-bit elements apart would take
// two or four times as many.
template <class V>
struct Kept {
  using Raw =
      std::conditional_t<sizeof(V) == 16, uint4, std::conditional_t<sizeof(V) == 8, uint2, V>>;
  Raw raw;
  Kept() = default;
  __device__ Kept(const V& v) : raw(std::bit_cast<Raw>(v)) {}
  __device__ V get() const { return std::bit_cast<V>(raw); }
};

// The same for memory that the kernel touches once, past the L1.
template <bool kAligned, class T, int kCount>
__device__ inline void load_once(Vec<T, kCount>& v, const T* p, int count = kCount) {
  if constexpr (kAligned && sizeof(v) == 16) {
    v = std::bit_cast<Vec<T, kCount>>(ld_once(reinterpret_cast<const uint4*>(p)));
  } else if constexpr (kAligned && sizeof(v) == 8) {
    v = std::bit_cast<Vec<T, kCount>>(ld_once(reinterpret_cast<const uint2*>(p)));
  } else {
    load<kAligned>(v, p, count);
  }
}

template <bool kAligned, class T, int kCount>
__device__ inline void load_once(Kept<Vec<T, kCount>>& v, const T* p, int count = kCount) {
  if constexpr (kAligned && sizeof(v) >= 8) {
    v.raw = ld_once(reinterpret_cast<const decltype(v.raw)*>(p));
  } else {
    Vec<T, kCount> elements;
    load<kAligned>(elements, p, count);
    v = elements;
  }
}

template <bool kAligned, class T, int kCount>
__device__ inline void load(Kept<Vec<T, kCount>>& v, const T* p, int count = kCount) {
  if constexpr (kAligned) {
    v.raw = *reinterpret_cast<const decltype(v.raw)*>(p);
  } else {
    Vec<T, kCount> elements;
    load<kAligned>(elements, p, count);
    v = elements;
  }
}

template <bool kAligned, class T, int kCount>
__device__ inline void store_once(T* p, const Vec<T, kCount>& v, int count = kCount) {
  if constexpr (kAligned && sizeof(v) == 16) {
    st_once(reinterpret_cast<uint4*>(p), std::bit_cast<uint4>(v));
  } else if constexpr (kAligned && sizeof(v) == 8) {
    st_once(reinterpret_cast<uint2*>(p), std::bit_cast<uint2>(v));
  } else {
    store<kAligned>(p, v, count);
  }
}

// Division of numbers below 2^31 by a number that the host knows: a product and a shift (Granlund
// and Montgomery, 1994).
struct FastDivisor {
  constexpr explicit FastDivisor(int64_t by) : divisor(static_cast<uint32_t>(by)) {
    if (by == 0) return;
    while ((uint64_t{1} << (shift - 31)) < divisor) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + divisor - 1) / divisor);
  }
  __device__ uint32_t quotient(uint32_t n) const {
    return static_cast<uint32_t>(static_cast<uint64_t>(n) * multiplier >> shift);
  }
  // Any n from 0 on.
  __device__ int64_t long_quotient(int64_t n) const {
    return n >> 31 == 0 ? quotient(static_cast<uint32_t>(n)) : n / divisor;
  }
  uint32_t divisor, multiplier = 0;
  int shift = 31;
};

// 1 / x to 1 unit in the last place; 0 for an x above 2^126.
__device__ inline float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

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

// 2^x to 2 units in the last place.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// a / b rounded as a division is, for 1 <= b (what a logistic function divides by). To a T of 16
// bits the quotient is rounded once more, and one correction of an approximate one is enough: a
// test compares every 16-bit value with torch's.
template <class T>
__device__ inline float divide_by_at_least_one(float a, float b) {
  if constexpr (sizeof(T) == 2) {
    constexpr float kSmall =
        0x1p-32f;  // keeps the reciprocal of a large b among the normal numbers
    const float y = reciprocal_approx(b * kSmall) * kSmall;
    const float q = a * y, excess = fmaf(b, q, -a);  // this way round a zero keeps its sign
    return fabsf(excess) < INFINITY ? fmaf(-y, excess, q) : q;
  } else {
    if (b > 1e30f) return a / b;
    float y = reciprocal_approx(b);
    y = fmaf(fmaf(-b, y, 1.0f), y, y);
    float q = a * y;
    q = fmaf(fmaf(-b, q, a), y, q);
    // A quotient near the subnormals, or an infinite dividend, takes the long way.
    return fabsf(q) > 1e-30f && fabsf(q) < 1e30f ? fmaf(fmaf(-b, q, a), y, q) : a / b;
  }
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

// The same with a divisor that the host has prepared.
__device__ inline void split_slot(int64_t slot, int64_t block_size, const FastDivisor& fast,
                                  int64_t& block, int64_t& off) {
  block = fast.long_quotient(slot);
  off = slot - block * block_size;
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
