#pragma once
#include "prim/gpu.h"

namespace gpu {
inline uint32_t shuffle_first(uint32_t value) { return __shfl_sync(0xffffffffu, value, 0); }
}  // namespace gpu
