// Stores past the caches, for results that the caches cannot keep anyway: a cached store of a line
// reads it first and evicts another, a streamed one does neither.
#pragma once

#include <cstdint>
#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace cpu {

enum class Stores { kCached, kStreamed };

// Streamed stores pay by the whole cache line.
inline constexpr int64_t kLine = 64;
// Whether an address begins a line, and so does every one that lies any of these steps (bytes) on.
inline bool on_lines(const void* at, std::initializer_list<int64_t> steps) {
  int64_t bits = static_cast<int64_t>(reinterpret_cast<uintptr_t>(at));
  for (const int64_t step : steps) bits |= step;
  return bits % kLine == 0;
}

// Bytes of the last-level cache that a core shares, 0 if unknown. The C library would give the sum
// of those of a whole AMD socket.
inline int64_t last_cache_bytes() {
  int64_t largest = 0;
#if defined(__x86_64__)
  // Deterministic cache parameters: leaf 4 of Intel's, 0x8000001d of AMD's, in one format.
  for (const unsigned leaf : {0x4u, 0x8000001du}) {
    for (unsigned index = 0; index < 8; ++index) {
      unsigned a, b, c, d;
      if (!__get_cpuid_count(leaf, index, &a, &b, &c, &d) || (a & 0x1fu) == 0) break;
      const int64_t ways = (b >> 22) + 1, partitions = (b >> 12 & 0x3ffu) + 1;
      const int64_t bytes = ways * partitions * ((b & 0xfffu) + 1) * (int64_t{c} + 1);
      if ((a >> 5 & 7u) == 3 && bytes > largest) largest = bytes;
    }
  }
#endif
  return largest;
}

// Whether an op that reads and writes this many bytes should stream its results: they are more than
// the last-level cache holds. Never where its size is unknown.
inline bool beyond_caches(int64_t bytes) {
  static const int64_t cache = last_cache_bytes();
  return cache > 0 && bytes > cache;
}

// Streamed stores are ordered with nothing: after the last of them, before another thread is told.
inline void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace cpu
