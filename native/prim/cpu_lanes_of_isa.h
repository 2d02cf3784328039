// Vectors of fp32 for the instruction set LANES_ISA: loads, stores, conversions and elementary
// functions. Included by cpu_each_isa.h inside a namespace; no include guard. The vectors are the
// compiler's own, so that +, -, *, /, comparisons and ?: work on them lane by lane.
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
LANES Ints places() {
  Ints places;
  for (int j = 0; j < kWidth; ++j) places[j] = j;
  return places;
}

LANES Floats splat(float x) { return x - Floats{}; }
LANES Floats magnitude(Floats x) { return (Floats)((Words)x & 0x7fffffffu); }

// The largest lane.
LANES uint32_t largest_of(Words x) {
#pragma GCC unroll 4
  for (int width = kWidth / 2; width > 0; width /= 2) {
    const Words other = __builtin_shuffle(x, places() ^ width);
    x = other > x ? other : x;
  }
  return x[0];
}

// Asks for what lies 2 KB further on, wherever that is.
LANES void prefetch(const void* at) { __builtin_prefetch(static_cast<const char*>(at) + 2048); }

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

// The low bytes of words below 2^8.
LANES Bytes narrow_to_bytes(Words x) {
#if LANES_ISA == 3
  return (Bytes)_mm512_cvtepi32_epi8((__m512i)x);
#elif LANES_ISA == 2
  const __m128i v = (__m128i)narrow(x);
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

LANES void store(float* at, Floats x) { std::memcpy(at, &x, sizeof x); }

LANES void store(cpu::BFloat16* at, Floats x) {
  const Words u = (Words)x;
  Words rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  rounded = x == x ? rounded : Words{} + 0x7fc0u;
  const Shorts bits = narrow(rounded);
  std::memcpy(at, &bits, sizeof bits);
}

LANES void store(cpu::Half* at, Floats x) {
#if LANES_ISA == 3
  const __m256i bits = _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif LANES_ISA == 2
  const __m128i bits = _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Words u = (Words)x & 0x7fffffffu;
  const Words normal = (u - (112u << 23) + 0xfffu + ((u >> 13) & 1u)) >> 13;
  const Words subnormal = (Words)((Floats)u + 0.5f) - cpu::bits_of(0.5f);
  Words h = u < 113u << 23 ? subnormal : normal;
  h = u >= 143u << 23 ? Words{} + 0x7c00u : h;
  h = u > 0x7f800000u ? Words{} + 0x7e00u : h;
  const Shorts bits = narrow(h | ((Words)x >> 16 & 0x8000u));
#endif
  std::memcpy(at, &bits, sizeof bits);
}

// --- 8-bit codes, as in cpu_floats.h ---

template <cpu::Fp8 kFormat>
LANES Words to_fp8(Floats x) {
  constexpr bool kE4 = kFormat == cpu::Fp8::kE4M3;
  constexpr uint32_t kShift = kE4 ? 20 : 21, kBias = kE4 ? 7 : 15;
  constexpr uint32_t kLargest = kE4 ? 0x43e00000u : 0x47600000u;
  constexpr float kMagic = kE4 ? 0x1p14f : 0x1p7f;
  const Words given = (Words)x & 0x7fffffffu, sign = ((Words)x >> 24) & 0x80u;
  const Words u = given > kLargest ? Words{} + kLargest : given;
  const Words normal =
      (u - ((127u - kBias) << 23) + (1u << (kShift - 1)) - 1u + ((u >> kShift) & 1u)) >> kShift;
  const Words subnormal = (Words)((Floats)u + kMagic) - cpu::bits_of(kMagic);
  const Words code = u < (128u - kBias) << 23 ? subnormal : normal;
  return (given > 0x7f800000u ? Words{} + 0x7fu : code) | sign;
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
LANES void store_codes(uint8_t* at, Words codes) {
  const Bytes bytes = narrow_to_bytes(codes);
  std::memcpy(at, &bytes, sizeof bytes);
}

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
template <bool kAnyNan = true, class T>
LANES void store_pair(T* at, Pair x) {
  store(at, x.a);
  store(at + kWidth, x.b);
}

// bf16: the items at even and at odd places, which shifts and masks tell apart.
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
template <bool kAnyNan = true>
LANES void store_pair(cpu::BFloat16* at, Pair x) {
  const Words a = rounded_bits<kAnyNan>(x.a), b = rounded_bits<kAnyNan>(x.b);
  const Words both = a >> 16 | (b & 0xffff0000u);
  std::memcpy(at, &both, sizeof both);
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

// --- elementary functions ---

// 1 / x for 1 <= x <= 2^126, to an ulp or two.
LANES Floats reciprocal(Floats x) {
#if LANES_ISA == 3
  const Floats guess = (Floats)_mm512_rcp14_ps((__m512)x);
  return guess + guess * (1.0f - x * guess);
#else
  return 1.0f / x;
#endif
}

// 2^y for y <= 128, to a relative error of 8e-8, or of 3e-6 with kShort (enough for 16 bits): the
// fraction by a minimax polynomial of degree 5 or 4.
template <bool kShort>
LANES Floats exp2_of(Floats y, Floats correction) {
#if LANES_ISA == 3
  const Floats f = (Floats)_mm512_reduce_ps((__m512)y, 1) + correction;  // y - floor(y)
  Floats p;
  if constexpr (kShort) {
    p = f * 0.0135206032f + 0.05203742877f;
    p = p * f + 0.2414274933f;
    p = p * f + 0.6930066207f;
    p = p * f + 1.000002518f;
  } else {
    p = f * 0.001876232945f + 0.008992584031f;
    p = p * f + 0.05582360446f;
    p = p * f + 0.2401545299f;
    p = p * f + 0.6931529682f;
    p = p * f + 0.9999999269f;
  }
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)y);  // p 2^floor(y)
#else
  y = y < -152.0f ? splat(-152.0f) : y;  // a NaN stays
  constexpr float kRound = 0x1.8p23f;
  const Floats shifted = y + kRound;
  const Floats f = y - (shifted - kRound) + correction;
  Floats p;
  if constexpr (kShort) {
    p = f * 0.009560510207f + 0.05591703917f;
    p = p * f + 0.2402498111f;
    p = p * f + 0.6931219677f;
    p = p * f + 0.9999991909f;
  } else {
    p = f * 0.001326697039f + 0.009675459746f;
    p = p * f + 0.05550742616f;
    p = p * f + 0.2402212175f;
    p = p * f + 0.6931469492f;
    p = p * f + 1.000000071f;
  }
  // 2^n as a product of two, so that neither overflows.
  const Ints n = (Ints)shifted - (Ints)splat(kRound), half = n >> 1;
  return p * (Floats)((half + 127) << 23) * (Floats)((n - half + 127) << 23);
#endif
}

// e^x for x <= 87, with the error of exp2_of; for kShort |x| times 6e-8 more.
template <bool kShort>
LANES Floats exp(Floats x) {
  constexpr float kLog2e = 1.44269504f, kRest = 1.92596303e-8f;
  if constexpr (!kShort) x = x < -105.0f ? splat(-105.0f) : x;  // no inf - inf below
  const Floats y = x * kLog2e;
  if constexpr (kShort) return exp2_of<true>(y, Floats{});
  return exp2_of<false>(y, (x * kLog2e - y) + x * kRest);
}
