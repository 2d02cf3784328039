// What the kvcache ops need of torch on the CPU: the argument checks and its thread pool.
#include <torch/csrc/stable/ops.h>

#include "prim/cpu_parallel.h"
#include "torch/kvcache_checks.inc"

namespace kvcache_glue {

Launch::Launch(const Arg& /*where*/) {}
Launch::~Launch() = default;

Stream current_stream() { return nullptr; }

const uint8_t* host_pointer(const Checks& /*checks*/, const Arg& host) {
  return static_cast<const uint8_t*>(host.data);
}

}  // namespace kvcache_glue

namespace cpu {

void parallel_ranges(int64_t begin, int64_t end, int64_t grain,
                     void (*body)(void* context, int64_t begin, int64_t end), void* context) {
  torch::stable::parallel_for(begin, end, grain,
                              [&](int64_t from, int64_t to) { body(context, from, to); });
}

}  // namespace cpu
