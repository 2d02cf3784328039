// The GPU platform, CUDA or HIP, under one set of names. The only header that includes the vendor's
// runtime; together with the other files of prim/ the only place with #if on the platform.
#pragma once

#include <stdexcept>

#include "prim/text.h"

#if defined(__HIP__) || defined(__HIP_PLATFORM_AMD__)
#define COMMUNICATORS_HIP 1
#include <hip/hip_runtime.h>
#define GPU_PLATFORM "HIP"
#define GPU_NAME(name) hip##name
#define GPU_NAME_OF_CAPTURE_INFO hipStreamGetCaptureInfo_v2
#define __grid_constant__    // CUDA's; kernel parameters are in constant memory here anyway
#define GPU_COLD __device__  // a call would need a stack, in memory
#else
#define COMMUNICATORS_HIP 0
#include <cuda_runtime.h>
#define GPU_PLATFORM "CUDA"
#define GPU_NAME(name) cuda##name
#define GPU_NAME_OF_CAPTURE_INFO cudaStreamGetCaptureInfo  // the later arguments have defaults
#define GPU_COLD __device__ __noinline__  // keeps what hardly ever runs out of the registers
#endif

namespace gpu {

using Stream = GPU_NAME(Stream_t);
using Error = GPU_NAME(Error_t);
using IpcMemHandle = GPU_NAME(IpcMemHandle_t);
inline constexpr Error kSuccess = GPU_NAME(Success);

// A failed runtime call: its text, the runtime's own error name and description, file and line.
// The runtime's sticky "last error" is cleared, so that the next, innocent call does not report it.
inline void check(Error error, const char* call, const char* file, int line) {
  if (error == kSuccess) return;
  (void)GPU_NAME(GetLastError)();
  throw std::runtime_error(prim::text(GPU_PLATFORM " call ", call,
                                      " failed: ", GPU_NAME(GetErrorName)(error), " (",
                                      GPU_NAME(GetErrorString)(error), ") at ", file, ":", line));
}

// Makes a device current for one scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;
  bool changed_ = false;
};

}  // namespace gpu

// Throws on failure; never exits the process.
#define GPU_CHECK(call) ::gpu::check((call), #call, __FILE__, __LINE__)
// After a launch: configuration errors are reported at once, by the kernel's name.
#define GPU_CHECK_LAUNCH(name) \
  ::gpu::check(GPU_NAME(GetLastError)(), "launch of " name, __FILE__, __LINE__)

inline gpu::DeviceGuard::DeviceGuard(int device) {
  GPU_CHECK(GPU_NAME(GetDevice)(&previous_));
  if (previous_ != device) {
    GPU_CHECK(GPU_NAME(SetDevice)(device));
    changed_ = true;
  }
}

inline gpu::DeviceGuard::~DeviceGuard() {
  if (changed_) (void)GPU_NAME(SetDevice)(previous_);  // a destructor cannot report
}
