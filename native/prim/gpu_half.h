// The 16-bit dtypes and their conversions, two values per word. HIP's own headers for them call
// library functions; there the compiler's _Float16 and plain integer arithmetic serve.
#pragma once

#include <bit>
#include <cstdint>

#include "prim/gpu.h"

#if !COMMUNICATORS_HIP
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace gpu {

#if COMMUNICATORS_HIP

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

__device__ __forceinline__ float2 widen_halves(uint32_t word) {
  return make_float2(
      static_cast<float>(std::bit_cast<_Float16>(static_cast<uint16_t>(word))),
      static_cast<float>(std::bit_cast<_Float16>(static_cast<uint16_t>(word >> 16))));
}

__device__ __forceinline__ uint32_t round_to_halves(float low, float high) {
  const uint32_t a = std::bit_cast<uint16_t>(static_cast<_Float16>(low));
  const uint32_t b = std::bit_cast<uint16_t>(static_cast<_Float16>(high));
  return a | b << 16;
}

// To nearest, ties to even; a NaN becomes the canonical one, as on CUDA.
__device__ __forceinline__ uint32_t round_to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

__device__ __forceinline__ uint32_t round_to_bfloat16s(float low, float high) {
  return round_to_bfloat16(low) | round_to_bfloat16(high) << 16;
}

using Int16x2 = int16_t __attribute__((ext_vector_type(2)));
using Uint16x2 = uint16_t __attribute__((ext_vector_type(2)));

__device__ __forceinline__ uint32_t max_s16x2(uint32_t a, uint32_t b) {
  return std::bit_cast<uint32_t>(
      __builtin_elementwise_max(std::bit_cast<Int16x2>(a), std::bit_cast<Int16x2>(b)));
}
__device__ __forceinline__ uint32_t max_u16x2(uint32_t a, uint32_t b) {
  return std::bit_cast<uint32_t>(
      __builtin_elementwise_max(std::bit_cast<Uint16x2>(a), std::bit_cast<Uint16x2>(b)));
}

#else

using Half = __half;
using BFloat16 = __nv_bfloat16;

__device__ __forceinline__ float2 widen_halves(uint32_t word) {
  return __half22float2(reinterpret_cast<const __half2&>(word));
}

__device__ __forceinline__ uint32_t round_to_halves(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ __forceinline__ uint32_t round_to_bfloat16s(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// The larger of both halves of two words, as signed or unsigned integers.
__device__ __forceinline__ uint32_t max_s16x2(uint32_t a, uint32_t b) { return __vmaxs2(a, b); }
__device__ __forceinline__ uint32_t max_u16x2(uint32_t a, uint32_t b) { return __vmaxu2(a, b); }

#endif

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
// Sums of two pairs, each rounded once. The same bits as a sum in fp32 that is then rounded: a sum
// of two such numbers that fp32 cannot hold is nowhere near the middle between two of them.
#define COMMUNICATORS_PACKED_SUMS 1
__device__ __forceinline__ uint32_t add_halves(uint32_t a, uint32_t b) {
  uint32_t sum;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
}

__device__ __forceinline__ uint32_t add_bfloat16s(uint32_t a, uint32_t b) {
  uint32_t sum;
  asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
}
#endif

}  // namespace gpu
