// Launches with programmatic dependent launch where the GPU has it; recorded in CUDA graphs as well.
#pragma once

#include "prim/gpu.h"

namespace gpu {

struct LaunchConfig {
  int blocks;
  int threads;
  Stream stream;
  bool overlap;  // programmatic dependent launch: the kernel must call dependency_wait()
};

template <typename... Parameters, typename... Arguments>
void launch(const LaunchConfig& config, const char* name, void (*kernel)(Parameters...),
            Arguments... arguments) {
  cudaLaunchConfig_t native = {};
  native.gridDim = dim3(static_cast<unsigned>(config.blocks));
  native.blockDim = dim3(static_cast<unsigned>(config.threads));
  native.stream = config.stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  native.attrs = &attribute;
  native.numAttrs = config.overlap ? 1 : 0;
  check(cudaLaunchKernelEx(&native, kernel, static_cast<Parameters>(arguments)...), name, __FILE__,
        __LINE__);
}

}  // namespace gpu
