// Arrays of fp16 to fp32 and back, with the processor's own conversion instructions where it has
// them (x86-64: F16C, asked for at run time), else as in cpu_vec.h.
#pragma once

#include <cstddef>

#include "prim/cpu_dispatch.h"
#include "prim/cpu_vec.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace prim {

#if defined(__x86_64__)

inline bool has_f16c() {
  static const bool found = cpu::has_f16c();
  return found;
}

// Both convert as many as fill whole vectors, and return how many that were.
__attribute__((target("avx,f16c"))) inline size_t to_float_f16c(const Float16* in, float* out,
                                                                size_t n) {
  size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(half));
  }
  return i;
}

__attribute__((target("avx,f16c"))) inline size_t from_float_f16c(const float* in, Float16* out,
                                                                  size_t n) {
  size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), half);
  }
  return i;
}

#else

inline bool has_f16c() { return false; }
inline size_t to_float_f16c(const Float16*, float*, size_t) { return 0; }
inline size_t from_float_f16c(const float*, Float16*, size_t) { return 0; }

#endif

inline void to_float(const Float16* in, float* out, size_t n) {
  size_t i = has_f16c() ? to_float_f16c(in, out, n) : 0;
  for (; i < n; ++i) out[i] = to_float(in[i]);
}

inline void from_float(const float* in, Float16* out, size_t n) {
  size_t i = has_f16c() ? from_float_f16c(in, out, n) : 0;
  for (; i < n; ++i) from_float(in[i], out[i]);
}

}  // namespace prim
