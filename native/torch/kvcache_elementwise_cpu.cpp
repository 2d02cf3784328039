#include "torch/kvcache_elementwise.h"

STABLE_TORCH_LIBRARY_FRAGMENT(kvcache_ops, m) {
  m.def("rms_norm(Tensor! result, Tensor input, Tensor? weight, float epsilon) -> ()");
  m.def("fused_add_rms_norm(Tensor! input, Tensor! residual, Tensor? weight, float epsilon) -> ()");
  m.def(
      "rotary_embedding(Tensor positions, Tensor! query, Tensor!? key, int head_size, "
      "Tensor cos_sin_cache, bool is_neox, int rope_dim_offset=0, bool inverse=False) -> ()");
  m.def("silu_and_mul(Tensor! result, Tensor input) -> ()");
  m.def("mul_and_silu(Tensor! out, Tensor input) -> ()");
  m.def("gelu_and_mul(Tensor! out, Tensor input) -> ()");
  m.def("gelu_tanh_and_mul(Tensor! out, Tensor input) -> ()");
  m.def("fatrelu_and_mul(Tensor! out, Tensor input, float threshold) -> ()");
  m.def("swigluoai_and_mul(Tensor! out, Tensor input, float alpha=1.702, float limit=7.0) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kvcache_ops, CPU, m) {
#define REGISTER(name) m.impl(#name, torch_glue::boxed<&kvcache_glue::name>);
  KVCACHE_ELEMENTWISE_OPS(REGISTER)
#undef REGISTER
}
