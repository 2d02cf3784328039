// Exchanging registers between the lanes of a warp (CUDA: 32 lanes) or wavefront (AMD: 64).
#pragma once

#include <cstdint>

#include "prim/gpu.h"

namespace gpu {

// The value of the lane whose number differs in the bits of `mask`. All lanes take part, here and
// below.
__device__ __forceinline__ uint32_t shuffle_xor(uint32_t value, int mask) {
#if COMMUNICATORS_HIP
  return static_cast<uint32_t>(__shfl_xor(static_cast<int>(value), mask));
#else
  return __shfl_xor_sync(0xffffffffu, value, mask);
#endif
}
__device__ __forceinline__ float shuffle_xor(float value, int mask) {
#if COMMUNICATORS_HIP
  return __shfl_xor(value, mask);
#else
  return __shfl_xor_sync(0xffffffffu, value, mask);
#endif
}

// The value of lane `lane`.
template <class T>
__device__ __forceinline__ T shuffle(T value, int lane) {
#if COMMUNICATORS_HIP
  return __shfl(value, lane);
#else
  return __shfl_sync(0xffffffffu, value, lane);
#endif
}

// The value of lane `lane` (0 to 3) of this lane's quad: 4 neighbours.
__device__ __forceinline__ uint32_t shuffle_quad(uint32_t value, int lane) {
#if COMMUNICATORS_HIP
  return static_cast<uint32_t>(__shfl(static_cast<int>(value), lane, 4));
#else
  return __shfl_sync(0xffffffffu, value, lane, 4);
#endif
}

// Whether `value` is true in any lane.
__device__ __forceinline__ bool any_lane(bool value) {
#if COMMUNICATORS_HIP
  return __any(value) != 0;
#else
  return __any_sync(0xffffffffu, value) != 0;
#endif
}

#if !COMMUNICATORS_HIP  // whose wavefronts have 64 lanes
// One bit for each lane where `value` is true.
__device__ __forceinline__ uint32_t ballot(bool value) { return __ballot_sync(0xffffffffu, value); }
#endif

// The value of lane 0 of the first 32, in all of them.
__device__ __forceinline__ uint32_t shuffle_first(uint32_t value) {
#if COMMUNICATORS_HIP
  return static_cast<uint32_t>(__shfl(static_cast<int>(value), 0, 32));
#else
  return __shfl_sync(0xffffffffu, value, 0);
#endif
}

}  // namespace gpu
