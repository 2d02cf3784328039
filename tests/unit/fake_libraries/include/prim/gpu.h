// Stands in for native/prim/gpu.h where a test compiles a file without a GPU toolchain.
#pragma once

#include <stdexcept>

namespace gpu {

using Stream = void*;

struct DeviceGuard {
  explicit DeviceGuard(int device) {
    if (device > 1) throw std::runtime_error("invalid device ordinal");
  }
};

}  // namespace gpu
