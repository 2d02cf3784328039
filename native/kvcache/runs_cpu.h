// Runs of elements on the CPU: copied, quantized or dequantized.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "prim/cpu_lanes.h"
#include "prim/dtype.h"

namespace kvcache {
namespace {

// 2^ceil(log2(x)) of a positive normal x: any mantissa bit carries into the exponent.
ALWAYS_INLINE float power_of_two_at_least(float x) {
  return cpu::float_of((cpu::bits_of(x) + 0x7fffffu) & 0x7f800000u);
}

// How the scale of a group follows from its largest magnitude.
struct GroupScale {
  bool least_after;   // the least scale is 1e-4 itself, else 1e-4 / 448
  bool power_of_two;  // rounded up to one

  float of(float largest) const {
    const float scale =
        least_after ? std::max(largest / 448.0f, 1e-4f) : std::max(largest, 1e-4f) / 448.0f;
    return power_of_two ? power_of_two_at_least(scale) : scale;
  }
};

#define LANES_KERNEL "kvcache/runs_lanes.h"
#include "prim/cpu_each_isa.h"

// n elements into a cache of the given format; a copy is never streamed.
template <cpu::Stores kStores = cpu::Stores::kCached, class T>
void store_run(void* out, const T* x, int64_t n, KvFormat format, float scale) {
  switch (format) {
    case KvFormat::kCopy:
      return PICK_ISA(copy_run)(static_cast<char*>(out), reinterpret_cast<const char*>(x),
                                n * static_cast<int64_t>(sizeof(T)));
    case KvFormat::kE4M3:
      return PICK_ISA(quantize_run<cpu::Fp8::kE4M3, kStores, T>)(static_cast<uint8_t*>(out), x, n,
                                                                 scale);
    case KvFormat::kE5M2:
      return PICK_ISA(quantize_run<cpu::Fp8::kE5M2, kStores, T>)(static_cast<uint8_t*>(out), x, n,
                                                                 scale);
  }
}

template <cpu::Stores kStores = cpu::Stores::kCached, class T>
void load_run(T* out, const uint8_t* codes, int64_t n, KvFormat format, float scale) {
  const auto from_e4m3 = PICK_ISA(dequantize_run<cpu::Fp8::kE4M3, kStores, T>);
  const auto from_e5m2 = PICK_ISA(dequantize_run<cpu::Fp8::kE5M2, kStores, T>);
  (format == KvFormat::kE5M2 ? from_e5m2 : from_e4m3)(out, codes, n, scale);
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

}  // namespace
}  // namespace kvcache
