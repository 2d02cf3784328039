// Blocks of the packed cache layout, where the tokens of a block lie side by side, for one
// instruction set (see prim/cpu_lanes.h): whole cache lines put together from rows of tokens.

#if LANES_ISA == 3
// Quarter i of four vectors becomes vector i.
LANES void swap_quarters(__m512i (&v)[4]) {
  const __m512i low = _mm512_shuffle_i64x2(v[0], v[1], 0x44),
                low2 = _mm512_shuffle_i64x2(v[2], v[3], 0x44);
  const __m512i high = _mm512_shuffle_i64x2(v[0], v[1], 0xee),
                high2 = _mm512_shuffle_i64x2(v[2], v[3], 0xee);
  v[0] = _mm512_shuffle_i64x2(low, low2, 0x88);
  v[1] = _mm512_shuffle_i64x2(low, low2, 0xdd);
  v[2] = _mm512_shuffle_i64x2(high, high2, 0x88);
  v[3] = _mm512_shuffle_i64x2(high, high2, 0xdd);
}

template <int kItem>
LANES __m512i interleave_low(__m512i a, __m512i b) {
  return kItem == 1   ? _mm512_unpacklo_epi8(a, b)
         : kItem == 2 ? _mm512_unpacklo_epi16(a, b)
                      : _mm512_unpacklo_epi32(a, b);
}
template <int kItem>
LANES __m512i interleave_high(__m512i a, __m512i b) {
  return kItem == 1   ? _mm512_unpackhi_epi8(a, b)
         : kItem == 2 ? _mm512_unpackhi_epi16(a, b)
                      : _mm512_unpackhi_epi32(a, b);
}

// In each quarter: item i of row j becomes item j of row i.
template <int kItem>
LANES void swap_items(__m512i (&rows)[16 / kItem]) {
  constexpr int kSide = 16 / kItem;
  __m512i next[kSide];
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

// The keys of the 16 tokens of a block of 16, n items each that make up whole lines: 16 bytes of
// each token in turn. Prefetches `next`, which is read as these rows are.
template <cpu::Stores kStores, class C>
void keys_of_block(C* block, const Rows<C>& rows, const Rows<C>& next, int64_t n) {
  constexpr int64_t kItems = 16 / sizeof(C);
  for (int64_t j = 0; j < n; j += 4 * kItems) {
    for (int64_t i = 0; i < kTokens; i += 4) {
#if LANES_ISA == 3
      __m512i v[4];
      for (int k = 0; k < 4; ++k) {
        next.ask(i + k, j);
        v[k] = load_as<__m512i>(rows.row(i + k) + j);
      }
      swap_quarters(v);
      for (int k = 0; k < 4; ++k) {
        put<kStores>(block + (j + k * kItems) * kTokens + i * kItems, v[k]);
      }
#else
      for (int k = 0; k < 4; ++k) {
        next.ask(i + k, j);
        for (int64_t c = j; c < j + 4 * kItems; c += kItems) {
          std::memcpy(block + c * kTokens + (i + k) * kItems, rows.row(i + k) + c, 16);
        }
      }
#endif
    }
  }
}

// The values: item j of each token in turn.
template <cpu::Stores kStores, class C>
void values_of_block(C* block, const Rows<C>& rows, const Rows<C>& next, int64_t n) {
  constexpr int64_t kSide = 16 / sizeof(C);
  for (int64_t j = 0; j < n; j += 4 * kSide) {
#if LANES_ISA == 3
    constexpr int64_t kGroups = kTokens / kSide;
    __m512i v[kGroups][kSide];
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 16
      for (int i = 0; i < kSide; ++i) {
        next.ask(g * kSide + i, j);
        v[g][i] = load_as<__m512i>(rows.row(g * kSide + i) + j);
      }
      swap_items<sizeof(C)>(v[g]);
    }
    // Quarter q of v[g][k] is item j + q * kSide + k of group g; a line holds 4 / kGroups items.
#pragma GCC unroll 4
    for (int k = 0; k < kSide; k += 4 / kGroups) {
      __m512i lines[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) lines[i] = v[i % kGroups][k + i / kGroups];
      swap_quarters(lines);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) put<kStores>(block + (j + q * kSide + k) * kTokens, lines[q]);
    }
#else
    for (int64_t g = 0; g < kTokens; g += kSide) {
      for (int64_t i = g; i < g + kSide; ++i) next.ask(i, j);
      for (int64_t q = j; q < j + 4 * kSide; q += kSide) {
        transpose_square(block + q * kTokens + g, kTokens, rows.row(g) + q, rows.stride);
      }
    }
#endif
  }
}
