// The namespaces of the native operators. Operator families add to them with
// STABLE_TORCH_LIBRARY_FRAGMENT in files of their own.
#include <torch/csrc/stable/library.h>

#include <string>

#include "torch/errors.h"

namespace {

std::string native_version() { return COMMUNICATORS_VERSION; }

}  // namespace

STABLE_TORCH_LIBRARY(communicators, m) { m.def("native_version() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(communicators, CompositeExplicitAutograd, m) {
  m.impl("native_version", torch_glue::boxed<&native_version>);
}

STABLE_TORCH_LIBRARY(kvcache_ops, m) { (void)m; }
