// What the kvcache ops need of torch on the CPU: the argument checks and its thread pool.
#include <torch/csrc/stable/ops.h>

#include "prim/cpu_dispatch.h"
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
namespace {

const Isa best = best_isa();

}  // namespace

Isa chosen_isa = best;

void parallel_ranges(int64_t begin, int64_t end, int64_t grain,
                     void (*body)(void* context, int64_t begin, int64_t end), void* context) {
  torch::stable::parallel_for(begin, end, grain,
                              [&](int64_t from, int64_t to) { body(context, from, to); });
}

}  // namespace cpu

// For tests: from now on no instruction set above `most` is used (1 portable, 2 AVX2, 3 AVX-512).
// Returns the one that is.
extern "C" __attribute__((visibility("default"))) int32_t kvcache_limit_isa(int32_t most) {
  const auto wanted = static_cast<cpu::Isa>(most);
  cpu::chosen_isa = wanted < cpu::best ? wanted : cpu::best;
  return static_cast<int32_t>(cpu::chosen_isa);
}
