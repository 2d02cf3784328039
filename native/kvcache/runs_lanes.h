// Runs of elements quantized and dequantized, for one instruction set (see prim/cpu_lanes.h).
#include "prim/cpu_lanes_fp8.h"

// A copy in stores of whole vectors at their own alignment: with 64 bytes a whole cache line each,
// which need not be read first. What lies behind the run, often the next, is prefetched meanwhile.
inline void copy_run(char* out, const char* in, int64_t bytes) {
  constexpr int64_t kBytes = sizeof(Words);
  if (bytes < 4 * kBytes) {
    if (bytes > 0) std::memcpy(out, in, bytes);  // nothing may have no address
    return;
  }
  const Words first = load_as<Words>(in), last = load_as<Words>(in + bytes - kBytes);
  std::memcpy(out, &first, kBytes);
  int64_t i = kBytes - static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % kBytes);
  for (; i + kBytes <= bytes; i += kBytes) {
    prefetch(in + i);
    const Words v = load_as<Words>(in + i);
    std::memcpy(__builtin_assume_aligned(out + i, kBytes), &v, kBytes);
  }
  std::memcpy(out + bytes - kBytes, &last, kBytes);
}

// Two copies line by line in turns, so that twice as many of their lines are on the way. Both
// outputs begin a cache line, and bytes is a multiple of one.
template <cpu::Stores kStores>
void copy_two_runs(char* out, const char* in, char* other_out, const char* other_in,
                   int64_t bytes) {
  constexpr int64_t kBytes = sizeof(Words);
  for (int64_t i = 0; i < bytes; i += kBytes) {
    if constexpr (kStores == cpu::Stores::kStreamed) {  // of cached data it only costs issue slots
      prefetch<kStores>(in + i);
      prefetch<kStores>(other_in + i);
    }
    put<kStores>(out + i, load_as<Words>(in + i));
    put<kStores>(other_out + i, load_as<Words>(other_in + i));
  }
}

// Returns how many items that was: all but what is left over of the last pair.
template <cpu::Fp8 kFormat, By kBy, cpu::Stores kStores, class T>
LANES int64_t quantize_pairs(uint8_t* out, const T* x, int64_t n, Floats scale) {
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    prefetch<kStores, 2 * kWidth>(x + i);
    quantize_pair<kFormat, kBy, kStores>(out + i, x + i, scale);
  }
  return i;
}

template <cpu::Fp8 kFormat, cpu::Stores kStores = cpu::Stores::kCached, class T>
LANES int64_t quantize_pairs(uint8_t* out, const T* x, int64_t n, float scale) {
  switch (by_of(scale)) {
    case By::kPowerOfTwo:
      return quantize_pairs<kFormat, By::kPowerOfTwo, kStores>(out, x, n, splat(1.0f / scale));
    case By::kPositive:
      return quantize_pairs<kFormat, By::kPositive, kStores>(out, x, n, splat(scale));
    default:
      return quantize_pairs<kFormat, By::kAny, kStores>(out, x, n, splat(scale));
  }
}

template <cpu::Fp8 kFormat, cpu::Stores kStores, class T>
void quantize_run(uint8_t* out, const T* x, int64_t n, float scale) {
  const int64_t i = quantize_pairs<kFormat, kStores>(out, x, n, scale);
  if (i == n) return;
  T in[2 * kWidth] = {};
  uint8_t codes[2 * kWidth];
  std::memcpy(in, x + i, (n - i) * sizeof(T));
  quantize_pair<kFormat, By::kAny, cpu::Stores::kCached>(codes, in, splat(scale));
  std::memcpy(out + i, codes, n - i);
}

template <cpu::Fp8 kFormat, cpu::Stores kStores, class T>
void dequantize_run(T* out, const uint8_t* codes, int64_t n, float scale) {
  const Floats s = splat(scale == scale ? scale : NAN);  // a NaN that store_pair<false> takes
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    dequantize_pair<kFormat, kStores>(out + i, codes + i, s);
  }
  if (i == n) return;
  uint8_t in[2 * kWidth] = {};
  T result[2 * kWidth];
  std::memcpy(in, codes + i, n - i);
  dequantize_pair<kFormat>(result, in, s);
  std::memcpy(out + i, result, (n - i) * sizeof(T));
}

// Largest magnitude; a NaN is passed over. n is a multiple of 32.
template <class T>
LANES float largest_magnitude(const T* x, int64_t n) {
  Floats a = {}, b = {};
  for (int64_t i = 0; i < n; i += 2 * kWidth) {
    const Pair v = load_pair(x + i);
    a = larger(magnitude(v.a), a);
    b = larger(magnitude(v.b), b);
  }
  return largest_of(larger(a, b));
}

// The scales that the largest magnitudes of groups of n items ask for.
template <class T>
void scales_of_groups(float* scales, const T* x, int64_t groups, int64_t n, GroupScale rule) {
  for (int64_t g = 0; g < groups; ++g) {
    prefetch(x + g * n);
    scales[g] = rule.of(largest_magnitude(x + g * n, n));
  }
}

// Groups of n items to e4m3 codes.
template <class T>
void quantize_groups(uint8_t* codes, const float* scales, const T* x, int64_t groups, int64_t n) {
  for (int64_t g = 0; g < groups; ++g) {
    quantize_pairs<cpu::Fp8::kE4M3>(codes + g * n, x + g * n, n, scales[g]);
  }
}
