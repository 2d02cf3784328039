#pragma once
#include "prim/gpu.h"

namespace gpu {
inline uint32_t shuffle_first(uint32_t value) { return exchange(value, 0); }
inline uint32_t shuffle_xor(uint32_t value, int mask) {
  return exchange(value, threadIdx.x ^ mask);
}
inline uint32_t shuffle_quad(uint32_t value, int lane) {
  return exchange(value, (threadIdx.x & ~3u) + lane);
}
inline bool any_lane(bool value) {
  bool any = false;
  warp_words[threadIdx.x] = value ? 1 : 0;
  block_barrier->arrive_and_wait();
  for (uint32_t lane = 0; lane < blockDim.x; ++lane) any = any || warp_words[lane] != 0;
  block_barrier->arrive_and_wait();
  return any;
}
}  // namespace gpu
