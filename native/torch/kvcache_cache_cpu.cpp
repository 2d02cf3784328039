#include "torch/kvcache_cache.h"

namespace kvcache_glue {
namespace {

void swap_blocks_batch(const Tensor& src_ptrs, const Tensor& dst_ptrs, const Tensor& sizes,
                       bool is_src_access_order_any) {
  const auto a = check_batch(src_ptrs, dst_ptrs, sizes, is_src_access_order_any);
  if (a.n > 0) kvcache::swap_blocks_batch(a, nullptr);
}

}  // namespace
}  // namespace kvcache_glue

// Two ops write to addresses that a tensor holds. Their schemas mark that tensor as written: an op
// that writes nothing and returns nothing is dropped by torch.compile.
STABLE_TORCH_LIBRARY_FRAGMENT(kvcache_ops, m) {
  m.def(
      "reshape_and_cache(Tensor key, Tensor value, Tensor! key_cache, Tensor! value_cache, "
      "Tensor slot_mapping, str kv_cache_dtype, Tensor k_scale, Tensor v_scale, "
      "bool interleaved_v=False) -> ()");
  m.def(
      "reshape_and_cache_flash(Tensor key, Tensor value, Tensor! key_cache, "
      "Tensor! value_cache, Tensor slot_mapping, str kv_cache_dtype, Tensor k_scale, "
      "Tensor v_scale) -> ()");
  m.def(
      "concat_and_cache_mla(Tensor kv_c, Tensor k_pe, Tensor! kv_cache, Tensor slot_mapping, "
      "str kv_cache_dtype, Tensor scale, bool skip_scale=False) -> ()");
  m.def(
      "concat_and_cache_mla_grouped(Tensor kv_c, Tensor k_pe, Tensor! kv_cache_ptrs, "
      "Tensor slot_mapping, int block_size, int block_stride, int entry_stride, "
      "Tensor? kv_scales=None, str kv_cache_dtype=\"auto\") -> ()");
  m.def(
      "concat_and_cache_mla_rope_fused(Tensor positions, Tensor! q_pe, Tensor! k_pe, Tensor kv_c, "
      "Tensor cos_sin_cache, bool is_neox, Tensor slot_mapping, Tensor! kv_cache, "
      "str kv_cache_dtype, Tensor kv_cache_scale) -> ()");
  m.def("convert_fp8(Tensor! dst_cache, Tensor src_cache, float scale, str kv_cache_dtype) -> ()");
  m.def(
      "gather_and_maybe_dequant_cache(Tensor src_cache, Tensor! dst, Tensor block_table, "
      "Tensor cu_seq_lens, Tensor token_to_seq, int num_tokens, str kv_cache_dtype, Tensor scale, "
      "Tensor? seq_starts) -> ()");
  m.def(
      "cp_gather_cache(Tensor src_cache, Tensor! dst, Tensor block_table, Tensor cu_seq_lens, "
      "int batch_size, Tensor? seq_starts) -> ()");
  m.def(
      "cp_gather_and_upconvert_fp8_kv_cache(Tensor src_cache, Tensor! dst, Tensor block_table, "
      "Tensor workspace_starts, int batch_size, Tensor? seq_starts, Tensor? host_cache=None, "
      "Tensor? host_row_ids=None, Tensor? device_row_ids=None) -> ()");
  m.def(
      "indexer_k_quant_and_cache(Tensor k, Tensor! kv_cache, Tensor slot_mapping, "
      "int quant_block_size, str kv_cache_dtype) -> ()");
  m.def(
      "cp_gather_indexer_k_quant_cache(Tensor kv_cache, Tensor! dst_k, Tensor! dst_scale, "
      "Tensor block_table, Tensor cu_seq_lens) -> ()");
  m.def(
      "swap_blocks(Tensor src, Tensor! dst, int block_size_in_bytes, Tensor block_mapping) -> ()");
  m.def(
      "swap_blocks_batch(Tensor src_ptrs, Tensor! dst_ptrs, Tensor sizes, "
      "bool is_src_access_order_any=False) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kvcache_ops, CPU, m) {
#define REGISTER(name) m.impl(#name, torch_glue::boxed<&kvcache_glue::name>);
  KVCACHE_CACHE_OPS(REGISTER)
#undef REGISTER
  m.impl("swap_blocks_batch", torch_glue::boxed<&kvcache_glue::swap_blocks_batch>);
}
