// Elementary functions on vectors of fp32 for the instruction set LANES_ISA, as exact as is asked
// for. Included by cpu_lanes_of_isa.h; no include guard.
//
// kBits is the number of significant bits that the result will be rounded to: 24, 11 or 8. The
// fewer there are, the shorter the chain of instructions, each of which waits for the one before.

template <class T>
constexpr int kBitsOf = std::is_same_v<T, float>       ? 24
                        : std::is_same_v<T, cpu::Half> ? 11
                                                       : 8;

// V is Floats or a group of them (see cpu_lanes_groups.h).

// The coefficients of a polynomial in x from the highest power down, one step for each.
template <class V, class... Lower>
LANES V polynomial(V x, float highest, float next, Lower... lower) {
  V p = x * highest + next;
  ((p = p * x + lower), ...);
  return p;
}

// 2^f, a polynomial as exact as kBits asks for: relative errors of 8e-8, 3e-6 and 8e-5. f lies in
// [0, 1) with AVX-512, in [-0.5, 0.5] otherwise.
template <int kBits, class V>
LANES V exp2_of_fraction(V f) {
#if LANES_ISA == 3
  if constexpr (kBits == 8) {
    return polynomial(f, 0.07802452147f, 0.2260671556f, 0.6958335638f, 0.9999251962f);
  } else if constexpr (kBits == 11) {
    return polynomial(f, 0.0135206032f, 0.05203742877f, 0.2414274933f, 0.6930066207f, 1.000002518f);
  } else {
    return polynomial(f, 0.001876232945f, 0.008992584031f, 0.05582360446f, 0.2401545299f,
                      0.6931529682f, 0.9999999269f);
  }
#else
  if constexpr (kBits < 24) {
    return polynomial(f, 0.009560510207f, 0.05591703917f, 0.2402498111f, 0.6931219677f,
                      0.9999991909f);
  } else {
    return polynomial(f, 0.001326697039f, 0.009675459746f, 0.05550742616f, 0.2402212175f,
                      0.6931469492f, 1.000000071f);
  }
#endif
}

#if LANES_ISA == 3
LANES Floats fraction(Floats y) { return (Floats)_mm512_reduce_ps((__m512)y, 1); }  // y - floor(y)
// p 2^floor(y)
LANES Floats times_exp2(Floats p, Floats y) {
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)y);
}
#else
// Where 2^y is 0 or infinite already, exponents end.
LANES Floats exponent(Floats y) { return at_most(at_least(y, -152.0f), 128.0f); }
constexpr float kRound = 0x1.8p23f;
LANES Floats fraction(Floats y) {  // y less the nearest integer
  y = exponent(y);
  return y - ((y + kRound) - kRound);
}
// p times 2 to the power of that integer, as a product of two, so that neither overflows.
LANES Floats times_exp2(Floats p, Floats y) {
  const Ints n = (Ints)(exponent(y) + kRound) - (Ints)splat(kRound), half = n >> 1;
  return p * (Floats)((half + 127) << 23) * (Floats)((n - half + 127) << 23);
}
#endif
// x y less what it was rounded to; 0 where products cannot be had whole.
LANES Floats lost(Floats x, float y, Floats product) {
#if LANES_ISA == 3
  return (Floats)_mm512_fmsub_ps((__m512)x, _mm512_set1_ps(y), (__m512)product);
#elif LANES_ISA == 2
  return (Floats)_mm256_fmsub_ps((__m256)x, _mm256_set1_ps(y), (__m256)product);
#else
  return x * y - product;
#endif
}
OF_EACH(fraction)
OF_EACH(times_exp2)
OF_EACH(lost)

#if LANES_ISA == 3
// Whole parts of 0 <= x < 16, as numbers of entries; and the entries of a table by those numbers.
LANES Floats entry_numbers(Floats x) { return (Floats)_mm512_cvttps_epi32((__m512)x); }
LANES Floats entries_of(const float (&table)[16], Floats numbers) {
  return (Floats)_mm512_permutexvar_ps((__m512i)numbers, _mm512_loadu_ps(table));
}
OF_EACH(entry_numbers)
#endif

// 2^y.
template <int kBits, class V>
LANES V exp2_of(V y) {
  return times_exp2(exp2_of_fraction<kBits>(fraction(y)), y);
}

// e^x, with the error of exp2_of; for kBits < 24 |x| times 6e-8 more, for 24 x must be below 1e38.
template <int kBits, class V>
LANES V exp(V x) {
  constexpr float kLog2e = 1.44269504f, kRest = 1.92596303e-8f;
  if constexpr (kBits < 24) return exp2_of<kBits>(x * kLog2e);
  const V y = x * kLog2e;
  return times_exp2(exp2_of_fraction<kBits>(fraction(y) + (lost(x, kLog2e, y) + x * kRest)), y);
}
