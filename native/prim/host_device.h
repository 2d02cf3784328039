// Functions that host and device compile from one source.
#pragma once

#if defined(__CUDACC__) || defined(__HIP__)
#define HOST_DEVICE __host__ __device__ inline __attribute__((always_inline))
#else
#define HOST_DEVICE inline
#endif

// Before a loop: unrolled on GPUs. The host's compiler does as it likes, and g++ warns of the word.
#if defined(__CUDA_ARCH__) || defined(__HIP_DEVICE_COMPILE__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL
#endif

#include <cstdint>

// `high` with its lowest byte replaced by byte `place` of `low`; one instruction on GPUs.
HOST_DEVICE uint32_t with_byte(uint32_t high, uint32_t low, int place) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(low, high, 0x7650u + static_cast<uint32_t>(place));
#elif defined(__HIP_DEVICE_COMPILE__)
  return __builtin_amdgcn_perm(high, low, 0x07060500u + static_cast<uint32_t>(place));
#else
  return (high & 0xffffff00u) | (low >> (8 * place) & 255u);
#endif
}
