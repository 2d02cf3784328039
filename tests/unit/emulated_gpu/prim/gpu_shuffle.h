#pragma once
#include "prim/gpu.h"

namespace gpu {
inline uint32_t shuffle_first(uint32_t value) { return exchange(value, 0); }
inline uint32_t shuffle_xor(uint32_t value, int mask) { return exchange(value, threadIdx.x ^ mask); }
inline uint32_t shuffle_quad(uint32_t value, int lane) {
  return exchange(value, (threadIdx.x & ~3u) + lane);
}
}  // namespace gpu
