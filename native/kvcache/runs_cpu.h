// Runs of elements on the CPU: copied, quantized or dequantized.
#pragma once

#include <cstdint>
#include <cstring>

#include "prim/cpu_dispatch.h"
#include "prim/cpu_floats.h"
#include "prim/dtype.h"

namespace kvcache {
namespace {

template <cpu::Fp8 kFormat, class T>
VECTORISED void quantize_run(uint8_t* __restrict out, const T* __restrict x, int64_t n,
                             float scale) {
  for (int64_t i = 0; i < n; ++i) out[i] = cpu::to_fp8<kFormat>(cpu::to_float(x[i]) / scale);
}

template <cpu::Fp8 kFormat, class T>
VECTORISED void dequantize_run(T* __restrict out, const uint8_t* __restrict codes, int64_t n,
                               float scale) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = cpu::from_float<T>(cpu::from_fp8<kFormat>(codes[i]) * scale);
  }
}

// n elements into a cache of the given format.
template <class T>
void store_run(void* out, const T* x, int64_t n, KvFormat format, float scale) {
  switch (format) {
    case KvFormat::kCopy:
      std::memcpy(out, x, n * sizeof(T));
      return;
    case KvFormat::kE4M3:
      return quantize_run<cpu::Fp8::kE4M3>(static_cast<uint8_t*>(out), x, n, scale);
    case KvFormat::kE5M2:
      return quantize_run<cpu::Fp8::kE5M2>(static_cast<uint8_t*>(out), x, n, scale);
  }
}

template <class T>
void load_run(T* out, const uint8_t* codes, int64_t n, KvFormat format, float scale) {
  format == KvFormat::kE5M2 ? dequantize_run<cpu::Fp8::kE5M2>(out, codes, n, scale)
                            : dequantize_run<cpu::Fp8::kE4M3>(out, codes, n, scale);
}

inline int64_t cache_item(DType dtype, KvFormat format) {
  return format == KvFormat::kCopy ? size_of(dtype) : 1;
}

// Calls f with a value of the C++ type of a float dtype.
template <class F>
void with_float(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat16:
      return f(cpu::Half{});
    default:
      return f(cpu::BFloat16{});
  }
}

// 2^ceil(log2(x)) of a positive normal x: any mantissa bit carries into the exponent.
ALWAYS_INLINE float power_of_two_at_least(float x) {
  return cpu::float_of((cpu::bits_of(x) + 0x7fffffu) & 0x7f800000u);
}

// Largest magnitude; a NaN is passed over (the bits of a NaN lie above those of infinity).
template <class T>
VECTORISED float largest_magnitude(const T* x, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t u = cpu::bits_of(cpu::to_float(x[i])) & 0x7fffffffu;
    const uint32_t seen = u > 0x7f800000u ? 0u : u;
    largest = seen > largest ? seen : largest;
  }
  return cpu::float_of(largest);
}

}  // namespace
}  // namespace kvcache
