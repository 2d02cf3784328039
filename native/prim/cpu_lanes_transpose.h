// Transposing items between whole vectors, where LANES_ISA has vectors of a cache line; no include
// guard (see cpu_lanes.h).

#if LANES_ISA == 3
using Line = __m512i;  // a cache line in a register

// Quarter i of four vectors becomes vector i.
LANES void swap_quarters(Line (&v)[4]) {
  const Line low = _mm512_shuffle_i64x2(v[0], v[1], 0x44),
             low2 = _mm512_shuffle_i64x2(v[2], v[3], 0x44);
  const Line high = _mm512_shuffle_i64x2(v[0], v[1], 0xee),
             high2 = _mm512_shuffle_i64x2(v[2], v[3], 0xee);
  v[0] = _mm512_shuffle_i64x2(low, low2, 0x88);
  v[1] = _mm512_shuffle_i64x2(low, low2, 0xdd);
  v[2] = _mm512_shuffle_i64x2(high, high2, 0x88);
  v[3] = _mm512_shuffle_i64x2(high, high2, 0xdd);
}

template <int kItem>
LANES Line interleave_low(Line a, Line b) {
  return kItem == 1   ? _mm512_unpacklo_epi8(a, b)
         : kItem == 2 ? _mm512_unpacklo_epi16(a, b)
                      : _mm512_unpacklo_epi32(a, b);
}
template <int kItem>
LANES Line interleave_high(Line a, Line b) {
  return kItem == 1   ? _mm512_unpackhi_epi8(a, b)
         : kItem == 2 ? _mm512_unpackhi_epi16(a, b)
                      : _mm512_unpackhi_epi32(a, b);
}

// In each quarter: item i of row j becomes item j of row i.
template <int kItem>
LANES void swap_items(Line (&rows)[16 / kItem]) {
  constexpr int kSide = 16 / kItem;
  Line next[kSide];
#pragma GCC unroll 4
  for (int turn = kSide; turn > 1; turn /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kSide / 2; ++i) {
      next[2 * i] = interleave_low<kItem>(rows[i], rows[i + kSide / 2]);
      next[2 * i + 1] = interleave_high<kItem>(rows[i], rows[i + kSide / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kSide; ++i) rows[i] = next[i];
  }
}
#endif
