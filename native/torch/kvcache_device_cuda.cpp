// What the kvcache ops need of torch on a GPU: the argument checks, its device and its stream.
#include "torch/kvcache_checks.inc"
#include "torch/stream.h"

namespace kvcache_glue {

Launch::Launch(const Arg& where)
    : stream(torch_glue::current_stream(where.device_index)),
      guard_(new gpu::DeviceGuard(where.device_index)) {}

Launch::~Launch() { delete static_cast<gpu::DeviceGuard*>(guard_); }

}  // namespace kvcache_glue
