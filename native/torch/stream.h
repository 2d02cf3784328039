// The stream that torch would launch on, for kernels that take raw pointers.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "prim/gpu.h"
#include "torch/errors.h"

namespace torch_glue {

inline gpu::Stream current_stream(int device) {
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(device, &stream) == 0,
        "torch has no current stream for cuda:", device);
  return static_cast<gpu::Stream>(stream);
}

}  // namespace torch_glue
