// Exchanging registers between the lanes of a warp (CUDA: 32 lanes) or wavefront (AMD: 64).
#pragma once

#include <cstdint>

#include "prim/gpu.h"

namespace gpu {

// The value of the lane whose number differs in the bits of `mask`. All lanes take part.
__device__ __forceinline__ uint32_t shuffle_xor(uint32_t value, int mask) {
#if COMMUNICATORS_HIP
  return static_cast<uint32_t>(__shfl_xor(static_cast<int>(value), mask));
#else
  return __shfl_xor_sync(0xffffffffu, value, mask);
#endif
}

}  // namespace gpu
