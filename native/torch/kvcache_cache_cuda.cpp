#include "torch/kvcache_cache.h"

STABLE_TORCH_LIBRARY_IMPL(kvcache_ops, CUDA, m) {
#define REGISTER(name) m.impl(#name, torch_glue::boxed<&kvcache_glue::name>);
  KVCACHE_CACHE_OPS(REGISTER)
#undef REGISTER
}

namespace kvcache_glue {
namespace {

// The addresses are in host tensors, so the device is the current one.
void swap_blocks_batch_cuda(const Tensor& src_ptrs, const Tensor& dst_ptrs, const Tensor& sizes,
                            bool is_src_access_order_any) {
  const auto a = check_batch(src_ptrs, dst_ptrs, sizes, is_src_access_order_any);
  if (a.n > 0) kvcache::swap_blocks_batch(a, current_stream());
}

}  // namespace
}  // namespace kvcache_glue

// Dispatch by the tensors' device cannot tell a batch for a GPU from one for the CPU: an op of its
// own, which kvcache_ops.swap_blocks_batch calls once this process uses a GPU. Both are there for
// tensors on a GPU too, to say that those belong on the host.
STABLE_TORCH_LIBRARY_FRAGMENT(kvcache_ops, m) {
  m.def(
      "swap_blocks_batch_cuda(Tensor src_ptrs, Tensor! dst_ptrs, Tensor sizes, "
      "bool is_src_access_order_any=False) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kvcache_ops, CPU, m) {
  m.impl("swap_blocks_batch_cuda", torch_glue::boxed<&kvcache_glue::swap_blocks_batch_cuda>);
}

STABLE_TORCH_LIBRARY_IMPL(kvcache_ops, CUDA, m) {
  m.impl("swap_blocks_batch_cuda", torch_glue::boxed<&kvcache_glue::swap_blocks_batch_cuda>);
  m.impl("swap_blocks_batch", torch_glue::boxed<&kvcache_glue::swap_blocks_batch_cuda>);
}
