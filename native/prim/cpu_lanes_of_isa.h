// Vectors of fp32 for the instruction set LANES_ISA: loads, stores and conversions. Included by
// cpu_each_isa.h inside a namespace; no include guard. The vectors are the compiler's own, so that
// +, -, *, /, comparisons and ?: work on them lane by lane.
//
// Conversions round to nearest even and give the same bits on every instruction set, but for the
// payload of a NaN.

#define LANES inline __attribute__((always_inline))

constexpr int kWidth = LANES_ISA == 3 ? 16 : LANES_ISA == 2 ? 8 : 4;
typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Shorts __attribute__((vector_size(2 * kWidth)));
typedef uint8_t Bytes __attribute__((vector_size(kWidth)));

template <class Vector, class Pointer>
LANES Vector load_as(const Pointer* at) {
  Vector v;
  std::memcpy(&v, at, sizeof v);
  return v;
}

// 0, 1, 2, ...
LANES Ints lane_numbers() {
  Ints numbers;
  for (int j = 0; j < kWidth; ++j) numbers[j] = j;
  return numbers;
}

LANES Floats splat(float x) { return x - Floats{}; }
LANES Floats magnitude(Floats x) { return (Floats)((Words)x & 0x7fffffffu); }

// The larger of the two; where x is a NaN, y.
LANES Floats larger(Floats x, Floats y) {
#if LANES_ISA == 3
  return (Floats)_mm512_max_ps((__m512)x, (__m512)y);
#elif LANES_ISA == 2
  return (Floats)_mm256_max_ps((__m256)x, (__m256)y);
#else
  return x > y ? x : y;
#endif
}

// max(x, least) and min(x, most) that leave a NaN as it is.
LANES Floats at_least(Floats x, float least) { return larger(splat(least), x); }
LANES Floats at_most(Floats x, float most) {
#if LANES_ISA == 3
  return (Floats)_mm512_min_ps(_mm512_set1_ps(most), (__m512)x);
#elif LANES_ISA == 2
  return (Floats)_mm256_min_ps(_mm256_set1_ps(most), (__m256)x);
#else
  return x > most ? splat(most) : x;
#endif
}

// x where it is greater than least, else 0.
LANES Floats if_above(Floats x, float least) { return x > least ? x : Floats{}; }

// min(|x|, most); of a NaN either.
LANES Floats magnitude_at_most(Floats x, float most) {
#if LANES_ISA == 3
  return (Floats)_mm512_range_ps((__m512)x, _mm512_set1_ps(most), 0xa);  // least size, no sign
#else
  return at_most(magnitude(x), most);
#endif
}

// The items 0 to kWidth - 1, as a pack for SHUFFLED.
constexpr auto kAll = std::make_integer_sequence<int, kWidth>{};
template <int kFlip, int... j>
LANES Floats flipped(Floats x, std::integer_sequence<int, j...> /*all*/) {
  return SHUFFLED(Ints, x, x, (j ^ kFlip)...);
}
template <int... j>
LANES Floats even_items(Floats a, Floats b, std::integer_sequence<int, j...> /*all*/) {
  return SHUFFLED(Ints, a, b, (2 * j)...);
}
template <int... j>
LANES Floats odd_items(Floats a, Floats b, std::integer_sequence<int, j...> /*all*/) {
  return SHUFFLED(Ints, a, b, (2 * j + 1)...);
}
// One of a, one of b, and so on, from the first or from the middle on.
template <int kFrom, int... j>
LANES Floats interleaved_from(Floats a, Floats b, std::integer_sequence<int, j...> /*all*/) {
  return SHUFFLED(Ints, a, b, (kFrom + j / 2 + j % 2 * kWidth)...);
}

// The largest lane.
template <int kAcross = kWidth / 2>
LANES float largest_of(Floats x) {
  x = larger(flipped<kAcross>(x, kAll), x);
  if constexpr (kAcross > 1) return largest_of<kAcross / 2>(x);
  return x[0];
}

// Prefetches the cache lines of so many items, or the one line, 2 KB further on, whatever lies
// there; for kStreamed into the first cache alone, as what is streamed passes once.
template <cpu::Stores kStores = cpu::Stores::kCached, int64_t kItems = 1, class T>
LANES void prefetch(const T* at) {
  constexpr int kLocality = kStores == cpu::Stores::kCached ? 3 : 0;
  for (int64_t i = 0; i < kItems; i += cpu::kLine / sizeof(T)) {
    __builtin_prefetch(reinterpret_cast<const char*>(at + i) + 2048, 0, kLocality);
  }
}

// A vector to memory: kStreamed past the caches (see prim/cpu_stream.h), to a multiple of its size.
template <cpu::Stores kStores = cpu::Stores::kCached, class Vector>
LANES void put(void* at, Vector v) {
#if LANES_ISA == 3
  if constexpr (kStores == cpu::Stores::kStreamed && sizeof v == 64) {
    return _mm512_stream_si512(static_cast<__m512i*>(at), (__m512i)v);
  }
#endif
#if LANES_ISA >= 2
  if constexpr (kStores == cpu::Stores::kStreamed && sizeof v == 32) {
    return _mm256_stream_si256(static_cast<__m256i*>(at), (__m256i)v);
  }
  if constexpr (kStores == cpu::Stores::kStreamed && sizeof v == 16) {
    return _mm_stream_si128(static_cast<__m128i*>(at), (__m128i)v);
  }
#endif
  std::memcpy(at, &v, sizeof v);
}

// --- 16-bit and 8-bit items to and from words ---

LANES Words widen(Shorts x) {
#if LANES_ISA == 3
  return (Words)_mm512_cvtepu16_epi32((__m256i)x);
#elif LANES_ISA == 2
  return (Words)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, Words);
#endif
}

LANES Words widen(Bytes x) {
#if LANES_ISA == 3
  return (Words)_mm512_cvtepu8_epi32((__m128i)x);
#elif LANES_ISA == 2
  return (Words)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)x));
#else
  return __builtin_convertvector(x, Words);
#endif
}

// The low halves of words below 2^16.
LANES Shorts narrow(Words x) {
#if LANES_ISA == 3
  return (Shorts)_mm512_cvtepi32_epi16((__m512i)x);
#elif LANES_ISA == 2
  const __m256i v = (__m256i)x;
  return (Shorts)_mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
#else
  return __builtin_convertvector(x, Shorts);
#endif
}

// The low bytes.
LANES Bytes narrow_to_bytes(Words x) {
#if LANES_ISA == 3
  return (Bytes)_mm512_cvtepi32_epi8((__m512i)x);
#elif LANES_ISA == 2
  const __m128i v = (__m128i)narrow(x & 0xffu);
  return (Bytes)_mm_cvtsi128_si64(_mm_packus_epi16(v, v));
#else
  return __builtin_convertvector(x, Bytes);
#endif
}

// --- floats ---

LANES Floats load(const float* at) { return load_as<Floats>(at); }
LANES Floats load(const cpu::BFloat16* at) { return (Floats)(widen(load_as<Shorts>(at)) << 16); }
LANES Floats load(const cpu::Half* at) {
#if LANES_ISA == 3
  return (Floats)_mm512_cvtph_ps(load_as<__m256i>(at));
#elif LANES_ISA == 2
  return (Floats)_mm256_cvtph_ps(load_as<__m128i>(at));
#else
  const Words x = widen(load_as<Shorts>(at)), size = x & 0x7fffu;
  const Words rebias = size >= 0x7c00u ? Words{} + ((255u - 31u) << 23) : Words{} + (112u << 23);
  const Floats subnormal = __builtin_convertvector((Ints)size, Floats) * 0x1p-24f;
  const Words bits = size < 0x400u ? (Words)subnormal : (size << 13) + rebias;
  return (Floats)(bits | (x & 0x8000u) << 16);
#endif
}

template <cpu::Stores kStores = cpu::Stores::kCached>
LANES void store(float* at, Floats x) {
  put<kStores>(at, x);
}

template <cpu::Stores kStores = cpu::Stores::kCached>
LANES void store(cpu::BFloat16* at, Floats x) {
  const Words u = (Words)x;
  Words rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  rounded = x == x ? rounded : Words{} + 0x7fc0u;
  put<kStores>(at, narrow(rounded));
}

template <cpu::Stores kStores = cpu::Stores::kCached>
LANES void store(cpu::Half* at, Floats x) {
#if LANES_ISA == 3
  const Shorts bits =
      (Shorts)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif LANES_ISA == 2
  const Shorts bits =
      (Shorts)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Words u = (Words)x & 0x7fffffffu;
  const Words normal = (u - (112u << 23) + 0xfffu + ((u >> 13) & 1u)) >> 13;
  const Words subnormal = (Words)((Floats)u + 0.5f) - cpu::bits_of(0.5f);
  Words h = u < 113u << 23 ? subnormal : normal;
  h = u >= 143u << 23 ? Words{} + 0x7c00u : h;
  h = u > 0x7f800000u ? Words{} + 0x7e00u : h;
  const Shorts bits = narrow(h | ((Words)x >> 16 & 0x8000u));
#endif
  put<kStores>(at, bits);
}

// --- fp8 values, as in cpu_floats.h ---

// The codes of |x| in the low bytes, rubbish above. A code counts in units that double with every
// power of two above the least normal number. Adding so large a power of two that its last bit is
// one unit rounds to units and counts them; that number's own last bits, an even number of units,
// take away what the exponent of the least normal number adds.
template <cpu::Fp8 kFormat>
LANES Words magnitude_to_fp8(Floats x) {
  constexpr bool kE4 = kFormat == cpu::Fp8::kE4M3;
  constexpr uint32_t kMantissa = kE4 ? 3 : 2, kLeast = kE4 ? 121 : 113;  // exponent, as in fp32
  constexpr uint32_t kLarge = ((23 - kMantissa) << 23) + (-(kLeast << kMantissa) & 0xffu);
  const Floats size = magnitude_at_most(x, kE4 ? 448.0f : 57344.0f);
  const Words power =
      (Words)at_least((Floats)((Words)size & 0x7f800000u), cpu::float_of(kLeast << 23));
  const Words counted = (Words)(size + (Floats)(power + kLarge));
  const Words code = counted + (power >> (23 - kMantissa));
  return x == x ? code : Words{} + 0x7fu;
}

template <cpu::Fp8 kFormat>
LANES Words to_fp8(Floats x) {
  return magnitude_to_fp8<kFormat>(x) | ((Words)x >> 24 & 0x80u);
}

template <cpu::Fp8 kFormat>
LANES Floats from_fp8(Words code) {
  constexpr bool kE4 = kFormat == cpu::Fp8::kE4M3;
  constexpr uint32_t kShift = kE4 ? 20 : 21, kBias = kE4 ? 7 : 15;
  const Words size = code & 0x7fu, sign = (code & 0x80u) << 24;
  const Floats subnormal = __builtin_convertvector((Ints)size, Floats) * (kE4 ? 0x1p-9f : 0x1p-16f);
  const Words normal = (size << kShift) + ((127u - kBias) << 23);
  Words u = size < (kE4 ? 8u : 4u) ? (Words)subnormal : normal;
  u = size >= (kE4 ? 0x7fu : 0x7cu) ? 0x7f800000u | size << kShift : u;
  return (Floats)(u | sign);
}

LANES Words load_codes(const uint8_t* at) { return widen(load_as<Bytes>(at)); }

// --- pairs of vectors ---
//
// 2 * kWidth items, in whatever order is cheapest to load; pairs loaded and stored by these two
// functions agree in it.
struct Pair {
  Floats a, b;
};

template <class T>
LANES Pair load_pair(const T* at) {
  return {load(at), load(at + kWidth)};
}
// Without kAnyNan a NaN must not have its low 16 bits set: true of what comes of bf16 operands.
template <bool kAnyNan = true, cpu::Stores kStores = cpu::Stores::kCached, class T>
LANES void store_pair(T* at, Pair x) {
  store<kStores>(at, x.a);
  store<kStores>(at + kWidth, x.b);
}

// bf16: the even and odd items, which shifts and masks tell apart.
template <>
LANES Pair load_pair<cpu::BFloat16>(const cpu::BFloat16* at) {
  const Words both = load_as<Words>(at);
  return {(Floats)(both << 16), (Floats)(both & 0xffff0000u)};
}
// The bits of the nearest bf16 in the upper half; the lower half is rubbish.
template <bool kAnyNan>
LANES Words rounded_bits(Floats x) {
  const Words u = (Words)x, rounded = u + 0x7fffu + ((u >> 16) & 1u);
  if constexpr (!kAnyNan) return rounded;
  return x == x ? rounded : Words{} + 0x7fc00000u;
}
#if LANES_ISA == 3
// The nearest bf16 of both, even and odd, as rounded_bits<false> but all at once: the
// lower halves and 0x7fff, or 0x8000 where the upper half is odd, carry into it or not; an average
// of 16-bit words keeps the carry.
LANES __m512i nearest_bf16(Floats even, Floats odd) {
  const __m512i a = (__m512i)even, b = (__m512i)odd, upper = _mm512_set1_epi32(-0x10000);
  constexpr int kAndOr = 0xea;  // (first & second) | third
  const __m512i high = _mm512_ternarylogic_epi32(b, upper, _mm512_srli_epi32(a, 16), kAndOr);
  const __m512i low =
      _mm512_ternarylogic_epi32(a, _mm512_set1_epi32(0xffff), _mm512_slli_epi32(b, 16), kAndOr);
  const __m512i least =
      _mm512_ternarylogic_epi32(high, _mm512_set1_epi16(1), _mm512_set1_epi16(0x7ffe), kAndOr);
  const __m512i carry = _mm512_srli_epi16(_mm512_avg_epu16(low, least), 15);
  return _mm512_add_epi16(high, carry);
}
#endif
template <bool kAnyNan = true, cpu::Stores kStores = cpu::Stores::kCached>
LANES void store_pair(cpu::BFloat16* at, Pair x) {
#if LANES_ISA == 3
  if constexpr (!kAnyNan) return put<kStores>(at, nearest_bf16(x.a, x.b));
#endif
  const Words a = rounded_bits<kAnyNan>(x.a), b = rounded_bits<kAnyNan>(x.b);
  put<kStores>(at, a >> 16 | (b & 0xffff0000u));
}

// x as T would hold it, a NaN being one as store_pair<false> takes it.
template <class T>
LANES Floats rounded_to(Floats x);
template <>
LANES Floats rounded_to<float>(Floats x) {
  return x;
}
template <>
LANES Floats rounded_to<cpu::BFloat16>(Floats x) {
  return (Floats)(rounded_bits<false>(x) & 0xffff0000u);
}
template <>
LANES Floats rounded_to<cpu::Half>(Floats x) {
#if LANES_ISA == 3
  return (Floats)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)x, 8));
#elif LANES_ISA == 2
  return (Floats)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)x, 8));
#else
  cpu::Half items[kWidth];
  store(items, x);
  return load(items);
#endif
}

// Two vectors in the order of their items, as store_pair<false> stores a NaN.
template <cpu::Stores kStores = cpu::Stores::kCached, class T>
LANES void store_two(T* at, Floats a, Floats b) {
#if LANES_ISA == 3
  if constexpr (std::is_same_v<T, cpu::BFloat16>) {  // the upper halves of both
    const __m512i odd = (__m512i)(lane_numbers() * 0x40004 + 0x30001);
    return put<kStores>(at, _mm512_permutex2var_epi16((__m512i)rounded_bits<false>(a), odd,
                                                      (__m512i)rounded_bits<false>(b)));
  }
  if constexpr (std::is_same_v<T, cpu::Half>) {
    const __m256i low = _mm512_cvtps_ph((__m512)a, 8), high = _mm512_cvtps_ph((__m512)b, 8);
    return put<kStores>(at, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
  }
#endif
  store<kStores>(at, a);
  store<kStores>(at + kWidth, b);
}

#include "prim/cpu_lanes_groups.h"
#include "prim/cpu_lanes_math.h"
