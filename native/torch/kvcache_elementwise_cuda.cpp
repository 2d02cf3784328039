#include "torch/kvcache_elementwise.h"

STABLE_TORCH_LIBRARY_IMPL(kvcache_ops, CUDA, m) {
#define REGISTER(name) m.impl(#name, torch_glue::boxed<&kvcache_glue::name>);
  KVCACHE_ELEMENTWISE_OPS(REGISTER)
#undef REGISTER
}
