// load_latency_us(pointer, bytes, hops): the latency measurement of p2p_worker.py.
#include <torch/csrc/stable/library.h>

#include "collectives/load_latency.h"
#include "torch/errors.h"

namespace {

double load_latency_us(int64_t pointer, int64_t bytes, int64_t hops) {
  torch_glue::check(
      pointer % 128 == 0 && bytes >= 1 << 12 && bytes <= 1 << 30 && hops > 0 && hops <= 1 << 20,
      "load_latency_us(pointer, bytes, hops): 128-byte aligned memory of 4 KiB to "
      "1 GiB and 1 to 2^20 hops are expected, got ",
      bytes, " bytes and ", hops, " hops");
  return collectives::load_latency_us(reinterpret_cast<uint32_t*>(pointer), bytes,
                                      static_cast<int>(hops));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(communicators, m) {
  m.def("load_latency_us(int pointer, int bytes, int hops) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(communicators, CompositeExplicitAutograd, m) {
  m.impl("load_latency_us", torch_glue::boxed<&load_latency_us>);
}
