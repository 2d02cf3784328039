// Elements and 16-byte vectors on the GPU: conversions to and from fp32, loads and stores that fall
// back to single elements where an address is not aligned, and small arithmetic.
#pragma once

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

// The other way round.
template <class T>
__device__ inline float2 widened_word(uint32_t word) {
  static_assert(sizeof(T) == 2);
  if constexpr (std::is_same_v<T, BFloat16>) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  } else {
    return widen_halves(word);
  }
}

// Two values rounded to T, as floats.
template <class T>
__device__ inline float2 rounded(float2 x) {
  if constexpr (sizeof(T) == 2) {
    return widened_word<T>(rounded_word<T>(x));
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
  if constexpr (sizeof(T) == 2) {
    uint32_t word;
    memcpy(&word, &v.at[i], 4);
    return widened_word<T>(word);
  } else {
    return {to_float(v.at[i]), to_float(v.at[i + 1])};
  }
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

template <bool kAligned, class T, int kCount>
__device__ inline void load(Kept<Vec<T, kCount>>& v, const T* p, int count = kCount) {
  if constexpr (kAligned) {
    v.raw = *reinterpret_cast<const decltype(v.raw)*>(p);
  } else {
    Vec<T, kCount> elements;
    load<false>(elements, p, count);
    v = elements;
  }
}

template <bool kAligned, class T, int kCount>
__device__ inline void store(T* p, const Kept<Vec<T, kCount>>& v, int count = kCount) {
  if constexpr (kAligned) {
    *reinterpret_cast<std::remove_cvref_t<decltype(v.raw)>*>(p) = v.raw;
  } else {
    store<false>(p, v.get(), count);
  }
}

// load() and store() for memory that the kernel touches once, past the L1.
template <bool kAligned, class T, int kCount>
__device__ inline void load_once(Kept<Vec<T, kCount>>& v, const T* p, int count = kCount) {
  if constexpr (kAligned && sizeof(v) >= 8) {
    v.raw = ld_once(reinterpret_cast<const decltype(v.raw)*>(p));
  } else {
    load<kAligned>(v, p, count);
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

template <bool kAligned, class T, int kCount>
__device__ inline void store_once(T* p, const Kept<Vec<T, kCount>>& v, int count = kCount) {
  if constexpr (kAligned && sizeof(v) >= 8) {
    st_once(reinterpret_cast<std::remove_cvref_t<decltype(v.raw)>*>(p), v.raw);
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

// The same with a divisor that the host has prepared; below 2^31 for an Index of 32 bits.
template <class Index>
struct Place {
  Index block, offset;
};
__device__ inline Place<uint32_t> place_of(uint32_t slot, const FastDivisor& block_size) {
  const uint32_t block = block_size.quotient(slot);
  return {block, slot - block * block_size.divisor};
}
__device__ inline Place<uint64_t> place_of(uint64_t slot, const FastDivisor& block_size) {
  const uint64_t block = block_size.long_quotient(static_cast<int64_t>(slot));
  return {block, slot - block * block_size.divisor};
}

// Whether numbers and strides are small enough for kernels that count in 32 bits.
template <class... Values>
bool narrow(Values... values) {
  return ((static_cast<int64_t>(values) >> 31 == 0) && ...);
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
