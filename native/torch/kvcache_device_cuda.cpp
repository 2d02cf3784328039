// What the kvcache ops need of torch on a GPU: the argument checks, its device and its stream.
#include "torch/kvcache_checks.inc"
#include "torch/stream.h"

namespace kvcache_glue {

Launch::Launch(const Arg& where)
    : stream(torch_glue::current_stream(where.device_index)),
      guard(new gpu::DeviceGuard(where.device_index)) {}

Launch::~Launch() { delete static_cast<gpu::DeviceGuard*>(guard); }

Stream current_stream() {
  int device = 0;
  GPU_CHECK(GPU_NAME(GetDevice)(&device));
  return torch_glue::current_stream(device);
}

const uint8_t* host_pointer(const Checks& checks, const Arg& host) {
  if (host.numel() == 0) return static_cast<const uint8_t*>(host.data);
  void* device = nullptr;
  if (GPU_NAME(HostGetDevicePointer)(&device, host.data, 0) != gpu::kSuccess) {
    (void)GPU_NAME(GetLastError)();
    checks.fail(host.name, "pageable memory", "pinned host memory");
  }
  return static_cast<const uint8_t*>(device);
}

}  // namespace kvcache_glue
