// Blocks of the packed cache layout, where the tokens of a block lie side by side, for one
// instruction set (see prim/cpu_lanes.h): whole cache lines put together from rows of tokens.

#include "prim/cpu_lanes_transpose.h"

// The keys of the 16 tokens of a block of 16, n items each that make up whole lines: 16 bytes of
// each token in turn. Prefetches `next`, which is read as these rows are.
template <cpu::Stores kStores, class C>
void keys_of_block(C* block, const Rows<C>& rows, const Rows<C>& next, int64_t n) {
  constexpr int64_t kItems = 16 / sizeof(C);
  for (int64_t j = 0; j < n; j += 4 * kItems) {
    for (int64_t i = 0; i < kTokens; i += 4) {
#if LANES_ISA == 3
      Line v[4];
      for (int k = 0; k < 4; ++k) {
        next.ask(i + k, j);
        v[k] = load_as<Line>(rows.row(i + k) + j);
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
    Line v[kGroups][kSide];
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 16
      for (int i = 0; i < kSide; ++i) {
        next.ask(g * kSide + i, j);
        v[g][i] = load_as<Line>(rows.row(g * kSide + i) + j);
      }
      swap_items<sizeof(C)>(v[g]);
    }
    // Quarter q of v[g][k] is item j + q * kSide + k of group g; a line holds 4 / kGroups items.
#pragma GCC unroll 4
    for (int k = 0; k < kSide; k += 4 / kGroups) {
      Line lines[4];
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
