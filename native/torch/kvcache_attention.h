// Attention ops: tensors checked and turned into the arguments of the kernels. One text for both
// devices; each library registers it under its own key.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>

#include "attention/attention.h"
#include "torch/kvcache_checks.h"

#define KVCACHE_ATTENTION_OPS(X) \
  X(paged_attention)             \
  X(paged_attention_v1)          \
  X(paged_attention_v2)          \
  X(merge_attn_states)

namespace kvcache_glue {
namespace {

const float* check_kv_scale(const Checks& checks, const char* name,
                            const std::optional<Tensor>& tensor) {
  if (!tensor) return nullptr;
  const Arg scale(name, *tensor);
  checks.on_device(scale);
  checks.dtype(scale, ScalarType::Float);
  if (scale.numel() != 1) checks.fail(name, "shape " + scale.shape(), "one element");
  return static_cast<const float*>(scale.data);
}

// The packed caches of reshape_and_cache: block and head strides free, the rest dense.
void check_packed(const Checks& checks, const Arg& key_cache, const Arg& value_cache,
                  attention::PagedAttentionArgs& a) {
  a.packed = true;
  a.x = 16 / item_bytes(key_cache);
  checks.value(a.head_size % a.x == 0, "query", a.head_size,
               "a head size whose cache items fill whole 16-byte chunks");
  checks.shape(key_cache, {-1, -1, a.head_size / a.x, -1, a.x});
  checks.dense_from(key_cache, 2);
  a.num_blocks = key_cache.size(0), a.kv_heads = key_cache.size(1);
  a.block_size = key_cache.size(3);
  checks.shape(value_cache, {a.num_blocks, a.kv_heads, a.head_size, a.block_size});
  checks.dense_from(value_cache, 2);
  a.k_block_stride = key_cache.stride(0), a.k_head_stride = key_cache.stride(1);
  a.v_block_stride = value_cache.stride(0), a.v_head_stride = value_cache.stride(1);
}

void check_flash(const Checks& checks, const Arg& key_cache, const Arg& value_cache,
                 attention::PagedAttentionArgs& a) {
  checks.shape(key_cache, {-1, -1, -1, a.head_size});
  checks.last_contiguous(key_cache);
  checks.same_shape(value_cache, key_cache);
  checks.last_contiguous(value_cache);
  a.num_blocks = key_cache.size(0), a.block_size = key_cache.size(1);
  a.kv_heads = key_cache.size(2);
  a.k_block_stride = key_cache.stride(0), a.k_page_stride = key_cache.stride(1);
  a.k_head_stride = key_cache.stride(2);
  a.v_block_stride = value_cache.stride(0), a.v_page_stride = value_cache.stride(1);
  a.v_head_stride = value_cache.stride(2);
}

// What the three decode ops share.
attention::PagedAttentionArgs check_attention(
    const Checks& checks, const Arg& out, const Arg& query, const Arg& key_cache,
    const Arg& value_cache, const Arg& tables, const Arg& lens, double scale,
    const std::optional<Tensor>& alibi_slopes, const std::string& kv_cache_dtype,
    const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  attention::PagedAttentionArgs a{};
  a.dtype = checks.float_dtype(query);
  checks.rank(query, 3, 3);
  checks.last_contiguous(query);
  a.sequences = query.size(0), a.heads = query.size(1), a.head_size = query.size(2);
  checks.value(a.head_size > 0 && a.head_size % 8 == 0 && a.head_size <= 256, "query", a.head_size,
               "a head size of 8 to 256, a multiple of 8,");
  checks.on_device(out);
  checks.dtype(out, query.dtype);
  checks.same_shape(out, query);
  checks.last_contiguous(out);
  checks.on_device(key_cache);
  checks.on_device(value_cache);
  if (kv_cache_dtype == "auto" || kv_cache_dtype == "float16" || kv_cache_dtype == "bfloat16") {
    a.format = KvFormat::kCopy;
    checks.dtype(key_cache, query.dtype);
  } else {
    a.format = parse_fp8(checks, "kv_cache_dtype", kv_cache_dtype);
    checks.dtype(key_cache, ScalarType::Byte);
  }
  checks.dtype(value_cache, key_cache.dtype);
  if (key_cache.dim != 5) checks.rank(key_cache, 4, 5);
  key_cache.dim == 5 ? check_packed(checks, key_cache, value_cache, a)
                     : check_flash(checks, key_cache, value_cache, a);
  if (a.kv_heads == 0 || a.heads % a.kv_heads != 0) {
    checks.fail("key_cache", std::to_string(a.kv_heads) + " heads",
                "a divisor of the " + std::to_string(a.heads) + " heads of query");
  }
  checks.value(a.block_size > 0, "key_cache", a.block_size, "a positive block size");
  checks.on_device(tables);
  checks.dtype(tables, ScalarType::Int);
  checks.rank(tables, 2, 2);
  checks.at_least(tables, 0, a.sequences, "the sequences of query");
  checks.last_contiguous(tables);
  checks.on_device(lens);
  checks.dtype(lens, ScalarType::Int);
  checks.rank(lens, 1, 1);
  checks.at_least(lens, 0, a.sequences, "the sequences of query");
  checks.contiguous(lens);
  if (alibi_slopes) {
    const Arg alibi("alibi_slopes", *alibi_slopes);
    checks.on_device(alibi);
    checks.dtype(alibi, ScalarType::Float);
    checks.shape(alibi, {a.heads});
    checks.contiguous(alibi);
    a.alibi = static_cast<const float*>(alibi.data);
  }
  a.k_scale = check_kv_scale(checks, "k_scale", k_scale);
  a.v_scale = check_kv_scale(checks, "v_scale", v_scale);
  if (a.format == KvFormat::kCopy) a.k_scale = a.v_scale = nullptr;
  a.out = out.data, a.query = query.data;
  a.key_cache = key_cache.data, a.value_cache = value_cache.data;
  a.tables = static_cast<const int32_t*>(tables.data);
  a.lens = static_cast<const int32_t*>(lens.data);
  a.table_width = tables.size(1), a.table_stride = tables.stride(0);
  a.query_stride = query.stride(0), a.query_head_stride = query.stride(1);
  a.out_stride = out.stride(0), a.out_head_stride = out.stride(1);
  a.longest = a.table_width * a.block_size;
  a.scale = static_cast<float>(scale);
  return a;
}

void launch_attention(attention::PagedAttentionArgs& a, const Arg& query,
                      const Tensor& query_tensor) {
  if (a.sequences == 0 || a.heads == 0) return;
  const Launch launch(query);
  const int64_t bytes = attention::paged_attention_scratch(a);
  std::optional<Tensor> scratch;  // from torch's allocator, which orders its reuse by stream
  if (bytes > 0) {
    scratch = torch::stable::new_empty(query_tensor, {bytes}, ScalarType::Byte);
    a.scratch = scratch->mutable_data_ptr();
  }
  attention::paged_attention(a, launch.stream);
}

void paged_attention(const Tensor& out_tensor, const Tensor& query_tensor, const Tensor& key_cache,
                     const Tensor& value_cache, const Tensor& block_tables, const Tensor& seq_lens,
                     double scale, const std::optional<Tensor>& out_lse,
                     const std::optional<Tensor>& alibi_slopes, const std::string& kv_cache_dtype,
                     const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  const Arg query("query", query_tensor), out("out", out_tensor);
  const Checks checks("paged_attention", query);
  attention::PagedAttentionArgs a = check_attention(
      checks, out, query, Arg("key_cache", key_cache), Arg("value_cache", value_cache),
      Arg("block_tables", block_tables), Arg("seq_lens", seq_lens), scale, alibi_slopes,
      kv_cache_dtype, k_scale, v_scale);
  if (out_lse) {
    const Arg lse("out_lse", *out_lse);
    checks.on_device(lse);
    checks.dtype(lse, ScalarType::Float);
    checks.shape(lse, {a.heads, a.sequences});
    a.lse = static_cast<float*>(lse.data);
    a.lse_head_stride = lse.stride(0), a.lse_sequence_stride = lse.stride(1);
  }
  launch_attention(a, query, query_tensor);
}

// What v1 and v2 say besides: the packed layout, sizes given again, block-sparse attention.
void check_versioned(const Checks& checks, attention::PagedAttentionArgs& a, int64_t num_kv_heads,
                     int64_t block_size, int64_t max_seq_len, int64_t tp_rank, int64_t local_blocks,
                     int64_t vert_stride, int64_t sparse_block, int64_t sliding_step) {
  if (!a.packed) {
    checks.fail("key_cache", "rank 4", "rank 5, the layout of reshape_and_cache,");
  }
  constexpr int64_t kSizes[] = {32, 64, 80, 96, 112, 120, 128, 192, 256};
  checks.value(std::find(std::begin(kSizes), std::end(kSizes), a.head_size) != std::end(kSizes),
               "query", a.head_size, "a head size of 32, 64, 80, 96, 112, 120, 128, 192 or 256");
  checks.value(num_kv_heads == a.kv_heads, "num_kv_heads", num_kv_heads,
               "the number of heads of key_cache");
  checks.value(block_size == a.block_size, "block_size", block_size, "the block size of key_cache");
  checks.value(block_size == 8 || block_size == 16 || block_size == 32, "block_size", block_size,
               "8, 16 or 32");
  checks.value(max_seq_len >= 0, "max_seq_len", max_seq_len, "a length of at least 0");
  if (vert_stride > 1) {
    checks.value(sparse_block > 0 && sparse_block % block_size == 0, "blocksparse_block_size",
                 sparse_block, "a positive multiple of block_size");
  }
  a.sparse = {tp_rank, local_blocks, vert_stride, sparse_block, sliding_step};
  a.epsilon = 1e-6f;
}

void paged_attention_v1(const Tensor& out_tensor, const Tensor& query_tensor,
                        const Tensor& key_cache, const Tensor& value_cache, int64_t num_kv_heads,
                        double scale, const Tensor& block_tables, const Tensor& seq_lens,
                        int64_t block_size, int64_t max_seq_len,
                        const std::optional<Tensor>& alibi_slopes,
                        const std::string& kv_cache_dtype, const Tensor& k_scale,
                        const Tensor& v_scale, int64_t tp_rank, int64_t blocksparse_local_blocks,
                        int64_t blocksparse_vert_stride, int64_t blocksparse_block_size,
                        int64_t blocksparse_head_sliding_step) {
  const Arg query("query", query_tensor), out("out", out_tensor);
  const Checks checks("paged_attention_v1", query);
  attention::PagedAttentionArgs a = check_attention(
      checks, out, query, Arg("key_cache", key_cache), Arg("value_cache", value_cache),
      Arg("block_tables", block_tables), Arg("seq_lens", seq_lens), scale, alibi_slopes,
      kv_cache_dtype, k_scale, v_scale);
  check_versioned(checks, a, num_kv_heads, block_size, max_seq_len, tp_rank,
                  blocksparse_local_blocks, blocksparse_vert_stride, blocksparse_block_size,
                  blocksparse_head_sliding_step);
  launch_attention(a, query, query_tensor);
}

void paged_attention_v2(const Tensor& out_tensor, const Tensor& exp_sums_tensor,
                        const Tensor& max_logits_tensor, const Tensor& tmp_out_tensor,
                        const Tensor& query_tensor, const Tensor& key_cache,
                        const Tensor& value_cache, int64_t num_kv_heads, double scale,
                        const Tensor& block_tables, const Tensor& seq_lens, int64_t block_size,
                        int64_t max_seq_len, const std::optional<Tensor>& alibi_slopes,
                        const std::string& kv_cache_dtype, const Tensor& k_scale,
                        const Tensor& v_scale, int64_t tp_rank, int64_t blocksparse_local_blocks,
                        int64_t blocksparse_vert_stride, int64_t blocksparse_block_size,
                        int64_t blocksparse_head_sliding_step) {
  const Arg query("query", query_tensor), out("out", out_tensor);
  const Arg exp_sums("exp_sums", exp_sums_tensor), max_logits("max_logits", max_logits_tensor);
  const Arg tmp_out("tmp_out", tmp_out_tensor);
  const Checks checks("paged_attention_v2", query);
  attention::PagedAttentionArgs a = check_attention(
      checks, out, query, Arg("key_cache", key_cache), Arg("value_cache", value_cache),
      Arg("block_tables", block_tables), Arg("seq_lens", seq_lens), scale, alibi_slopes,
      kv_cache_dtype, k_scale, v_scale);
  check_versioned(checks, a, num_kv_heads, block_size, max_seq_len, tp_rank,
                  blocksparse_local_blocks, blocksparse_vert_stride, blocksparse_block_size,
                  blocksparse_head_sliding_step);
  const int64_t needed = (max_seq_len + 511) / 512;
  checks.on_device(exp_sums);
  checks.dtype(exp_sums, ScalarType::Float);
  checks.shape(exp_sums, {a.sequences, a.heads, -1});
  checks.at_least(exp_sums, 2, needed, "partitions of 512 tokens in max_seq_len");
  checks.contiguous(exp_sums);
  checks.on_device(max_logits);
  checks.dtype(max_logits, ScalarType::Float);
  checks.same_shape(max_logits, exp_sums);
  checks.contiguous(max_logits);
  checks.on_device(tmp_out);
  checks.dtype(tmp_out, query.dtype);
  a.partitions = exp_sums.size(2);
  checks.shape(tmp_out, {a.sequences, a.heads, a.partitions, a.head_size});
  checks.contiguous(tmp_out);
  a.tmp_out = tmp_out.data;
  a.max_logits = static_cast<float*>(max_logits.data);
  a.exp_sums = static_cast<float*>(exp_sums.data);
  // A length beyond what the partitions hold must not be written past them.
  a.longest = std::min(a.longest, a.partitions * 512);
  launch_attention(a, query, query_tensor);
}

void check_state(const Checks& checks, const Arg& x, const Arg& out) {
  checks.on_device(x);
  checks.same_shape(x, out);
  checks.last_contiguous(x);
}

void check_lse(const Checks& checks, const Arg& lse, int64_t heads, int64_t tokens) {
  checks.on_device(lse);
  checks.dtype(lse, ScalarType::Float);
  checks.shape(lse, {heads, tokens});
}

void merge_attn_states(const Tensor& output, const std::optional<Tensor>& output_lse,
                       const Tensor& prefix_output, const Tensor& prefix_lse,
                       const Tensor& suffix_output, const Tensor& suffix_lse,
                       std::optional<int64_t> prefill_tokens_with_context,
                       const std::optional<Tensor>& output_scale) {
  const Arg out("output", output), prefix("prefix_output", prefix_output);
  const Arg suffix("suffix_output", suffix_output);
  const Arg p_lse("prefix_lse", prefix_lse), s_lse("suffix_lse", suffix_lse);
  const Checks checks("merge_attn_states", out);
  attention::MergeArgs m{};
  checks.rank(out, 3, 3);
  checks.last_contiguous(out);
  check_state(checks, prefix, out);
  m.dtype = checks.float_dtype(prefix);
  check_state(checks, suffix, out);
  checks.dtype(suffix, prefix.dtype);
  m.tokens = out.size(0), m.heads = out.size(1), m.head_size = out.size(2);
  check_lse(checks, p_lse, m.heads, m.tokens);
  check_lse(checks, s_lse, m.heads, m.tokens);
  if (output_scale) {
    m.out_scale = check_kv_scale(checks, "output_scale", output_scale);
    if (out.dtype != ScalarType::Byte && out.dtype != ScalarType::Float8_e4m3fn) {
      checks.fail("output", name_of(out.dtype), "uint8 or float8_e4m3fn with output_scale");
    }
  } else {
    checks.dtype(out, prefix.dtype);
  }
  if (output_lse) {
    const Arg lse("output_lse", *output_lse);
    check_lse(checks, lse, m.heads, m.tokens);
    m.out_lse = static_cast<float*>(lse.data);
    m.out_lse_stride0 = lse.stride(0), m.out_lse_stride1 = lse.stride(1);
  }
  m.with_prefix = prefill_tokens_with_context.value_or(m.tokens);
  checks.value(m.with_prefix >= 0 && m.with_prefix <= m.tokens, "prefill_tokens_with_context",
               m.with_prefix, "a count of 0 to the number of tokens");
  m.out = out.data, m.prefix = prefix.data, m.suffix = suffix.data;
  m.prefix_lse = static_cast<const float*>(p_lse.data);
  m.suffix_lse = static_cast<const float*>(s_lse.data);
  m.out_stride = out.stride(0), m.out_head_stride = out.stride(1);
  m.prefix_stride = prefix.stride(0), m.prefix_head_stride = prefix.stride(1);
  m.suffix_stride = suffix.stride(0), m.suffix_head_stride = suffix.stride(1);
  m.prefix_lse_stride0 = p_lse.stride(0), m.prefix_lse_stride1 = p_lse.stride(1);
  m.suffix_lse_stride0 = s_lse.stride(0), m.suffix_lse_stride1 = s_lse.stride(1);
  if (out.numel() == 0) return;
  const Launch launch(out);
  attention::merge_attn_states(m, launch.stream);
}

}  // namespace
}  // namespace kvcache_glue
