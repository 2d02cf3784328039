// Elementary functions on vectors of fp32 for the instruction set LANES_ISA, as exact as is asked
// for. Included by cpu_lanes_of_isa.h; no include guard.
//
// kBits is the number of significant bits that the result will be rounded to: 24, 11 or 8. The
// fewer there are, the shorter the chain of instructions, each of which waits for the one before.

template <class T>
constexpr int kBitsOf = std::is_same_v<T, float>       ? 24
                        : std::is_same_v<T, cpu::Half> ? 11
                                                       : 8;

// 1 / x for 1 <= x <= 2^126: to an ulp or two, or for kBits = 8 with a relative error of 7e-5.
template <int kBits>
LANES Floats reciprocal(Floats x) {
#if LANES_ISA == 3
  const Floats guess = (Floats)_mm512_rcp14_ps((__m512)x);
  if constexpr (kBits == 8) return guess;
  return guess + guess * (1.0f - x * guess);
#else
  return 1.0f / x;
#endif
}

// The coefficients of a polynomial in x from the highest power down, one step for each.
template <class... Lower>
LANES Floats polynomial(Floats x, float highest, float next, Lower... lower) {
  Floats p = x * highest + next;
  ((p = p * x + lower), ...);
  return p;
}

// 2^f, a polynomial as exact as kBits asks for: relative errors of 8e-8, 3e-6 and 8e-5. f lies in
// [0, 1) with AVX-512, in [-0.5, 0.5] otherwise.
template <int kBits>
LANES Floats exp2_of_fraction(Floats f) {
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

// 2^(y + rest) for y <= 128 and |rest| far below 1; without a rest for kBits < 24.
template <int kBits>
LANES Floats exp2_of(Floats y, Floats rest = Floats{}) {
#if LANES_ISA == 3
  Floats f = (Floats)_mm512_reduce_ps((__m512)y, 1);  // y - floor(y)
  if constexpr (kBits == 24) f += rest;
  return (Floats)_mm512_scalef_ps((__m512)exp2_of_fraction<kBits>(f), (__m512)y);  // 2^floor(y)
#else
  y = at_least(y, -152.0f);
  constexpr float kRound = 0x1.8p23f;
  const Floats shifted = y + kRound;
  Floats f = y - (shifted - kRound);
  if constexpr (kBits == 24) f += rest;
  // 2^n as a product of two, so that neither overflows.
  const Ints n = (Ints)shifted - (Ints)splat(kRound), half = n >> 1;
  return exp2_of_fraction<kBits>(f) * (Floats)((half + 127) << 23) *
         (Floats)((n - half + 127) << 23);
#endif
}

// e^x for x <= 87, with the error of exp2_of; for kBits < 24 |x| times 6e-8 more.
template <int kBits>
LANES Floats exp(Floats x) {
  constexpr float kLog2e = 1.44269504f, kRest = 1.92596303e-8f;
  if constexpr (kBits == 24) x = at_least(x, -105.0f);  // no inf - inf below
  const Floats y = x * kLog2e;
  if constexpr (kBits < 24) return exp2_of<kBits>(y);
  return exp2_of<kBits>(y, (x * kLog2e - y) + x * kRest);
}
