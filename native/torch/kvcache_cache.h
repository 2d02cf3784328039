// Cache ops: tensors checked and turned into the arguments of the kernels. One text for both
// devices; each library registers it under its own key.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "kvcache/cache.h"
#include "torch/kvcache_checks.h"

#define KVCACHE_CACHE_OPS(X)              \
  X(reshape_and_cache)                    \
  X(reshape_and_cache_flash)              \
  X(concat_and_cache_mla)                 \
  X(concat_and_cache_mla_grouped)         \
  X(concat_and_cache_mla_rope_fused)      \
  X(convert_fp8)                          \
  X(gather_and_maybe_dequant_cache)       \
  X(cp_gather_cache)                      \
  X(cp_gather_and_upconvert_fp8_kv_cache) \
  X(indexer_k_quant_and_cache)            \
  X(cp_gather_indexer_k_quant_cache)      \
  X(swap_blocks)

namespace kvcache_glue {
namespace {

// The format that a kv_cache_dtype string names, with the dtype of the cache checked: that of the
// floats for a copy, uint8 for codes.
KvFormat check_format(const Checks& checks, const std::string& text, const Arg& floats,
                      const Arg& cache) {
  if (text == "auto" || text == "float16" || text == "bfloat16") {
    checks.dtype(cache, floats.dtype);
    return KvFormat::kCopy;
  }
  const KvFormat format = parse_fp8(checks, "kv_cache_dtype", text);
  checks.dtype(cache, ScalarType::Byte);
  return format;
}

const int64_t* check_slots(const Checks& checks, const Arg& slots, const Arg& tokens) {
  checks.on_device(slots);
  checks.rank(slots, 1, 1);
  checks.dtype(slots, ScalarType::Long);
  checks.contiguous(slots);
  checks.at_least(tokens, 0, slots.size(0), "the length of slot_mapping");
  return static_cast<const int64_t*>(slots.data);
}

const float* check_scale(const Checks& checks, const Arg& scale) {
  checks.on_device(scale);
  checks.dtype(scale, ScalarType::Float);
  if (scale.numel() != 1) checks.fail(scale.name, "shape " + scale.shape(), "one element");
  return static_cast<const float*>(scale.data);
}

void reshape_and_cache(const Tensor& key_tensor, const Tensor& value_tensor,
                       const Tensor& key_cache_tensor, const Tensor& value_cache_tensor,
                       const Tensor& slot_mapping, const std::string& kv_cache_dtype,
                       const Tensor& k_scale, const Tensor& v_scale, bool interleaved_v) {
  const Arg key("key", key_tensor), value("value", value_tensor);
  const Arg key_cache("key_cache", key_cache_tensor),
      value_cache("value_cache", value_cache_tensor);
  const Arg slots("slot_mapping", slot_mapping);
  const Checks checks("reshape_and_cache", key);
  kvcache::ReshapeAndCacheArgs a{};
  a.dtype = checks.float_dtype(key);
  checks.rank(key, 3, 3);
  checks.dense_from(key, 1);
  checks.on_device(value);
  checks.dtype(value, key.dtype);
  checks.same_shape(value, key);
  checks.dense_from(value, 1);
  checks.on_device(key_cache);
  a.format = check_format(checks, kv_cache_dtype, key, key_cache);
  a.x = 16 / (a.format == KvFormat::kCopy ? size_of(a.dtype) : 1);
  a.heads = key.size(1), a.head_size = key.size(2);
  checks.value(a.head_size % a.x == 0, "key", a.head_size,
               "a head size whose cache items fill whole 16-byte chunks");
  checks.rank(key_cache, 5, 5);
  a.num_blocks = key_cache.size(0), a.block_size = key_cache.size(3);
  checks.shape(key_cache, {-1, a.heads, a.head_size / a.x, -1, a.x});
  checks.contiguous(key_cache);
  checks.on_device(value_cache);
  checks.dtype(value_cache, key_cache.dtype);
  if (interleaved_v) {
    checks.value(a.block_size % a.x == 0, "interleaved_v", a.block_size,
                 "a block size that is a multiple of x");
  }
  if (interleaved_v && value_cache.dim == 5) {
    checks.shape(value_cache, {a.num_blocks, a.heads, a.block_size / a.x, a.head_size, a.x});
  } else {
    checks.shape(value_cache, {a.num_blocks, a.heads, a.head_size, a.block_size});
  }
  checks.contiguous(value_cache);
  a.slots = check_slots(checks, slots, key);
  a.k_scale = check_scale(checks, Arg("k_scale", k_scale));
  a.v_scale = check_scale(checks, Arg("v_scale", v_scale));
  a.key = key.data, a.value = value.data;
  a.key_cache = key_cache.data, a.value_cache = value_cache.data;
  a.tokens = slots.size(0);
  a.key_stride = key.stride(0), a.value_stride = value.stride(0);
  a.interleaved_v = interleaved_v;
  if (a.tokens == 0 || key_cache.numel() == 0) return;
  const Launch launch(key);
  kvcache::reshape_and_cache(a, launch.stream);
}

void reshape_and_cache_flash(const Tensor& key_tensor, const Tensor& value_tensor,
                             const Tensor& key_cache_tensor, const Tensor& value_cache_tensor,
                             const Tensor& slot_mapping, const std::string& kv_cache_dtype,
                             const Tensor& k_scale_tensor, const Tensor& v_scale_tensor) {
  const Arg key("key", key_tensor), value("value", value_tensor);
  const Arg key_cache("key_cache", key_cache_tensor),
      value_cache("value_cache", value_cache_tensor);
  const Arg slots("slot_mapping", slot_mapping);
  const Arg k_scale("k_scale", k_scale_tensor), v_scale("v_scale", v_scale_tensor);
  const Checks checks("reshape_and_cache_flash", key);
  kvcache::ReshapeAndCacheFlashArgs a{};
  a.dtype = checks.float_dtype(key);
  checks.rank(key, 3, 3);
  checks.dense_from(key, 1);
  checks.on_device(value);
  checks.dtype(value, key.dtype);
  checks.same_shape(value, key);
  checks.dense_from(value, 1);
  checks.on_device(key_cache);
  a.format = check_format(checks, kv_cache_dtype, key, key_cache);
  a.heads = key.size(1), a.head_size = key.size(2);
  checks.shape(key_cache, {-1, -1, a.heads, a.head_size});
  checks.last_contiguous(key_cache);
  checks.on_device(value_cache);
  checks.dtype(value_cache, key_cache.dtype);
  checks.same_shape(value_cache, key_cache);
  checks.last_contiguous(value_cache);
  a.slots = check_slots(checks, slots, key);
  checks.on_device(k_scale);
  checks.dtype(k_scale, ScalarType::Float);
  if (k_scale.numel() != 1 && (k_scale.dim != 1 || k_scale.numel() != a.heads)) {
    checks.fail("k_scale", "shape " + k_scale.shape(),
                "[1] or [" + std::to_string(a.heads) + "], one a head,");
  }
  checks.contiguous(k_scale);
  checks.on_device(v_scale);
  checks.dtype(v_scale, ScalarType::Float);
  checks.same_shape(v_scale, k_scale);
  checks.contiguous(v_scale);
  a.k_scale = static_cast<const float*>(k_scale.data);
  a.v_scale = static_cast<const float*>(v_scale.data);
  a.scale_stride = k_scale.numel() > 1 ? 1 : 0;
  a.key = key.data, a.value = value.data;
  a.key_cache = key_cache.data, a.value_cache = value_cache.data;
  a.tokens = slots.size(0);
  a.num_blocks = key_cache.size(0), a.block_size = key_cache.size(1);
  a.key_stride = key.stride(0), a.value_stride = value.stride(0);
  a.key_block_stride = key_cache.stride(0), a.key_page_stride = key_cache.stride(1);
  a.key_head_stride = key_cache.stride(2);
  a.value_block_stride = value_cache.stride(0), a.value_page_stride = value_cache.stride(1);
  a.value_head_stride = value_cache.stride(2);
  if (a.tokens == 0 || key_cache.numel() == 0) return;
  const Launch launch(key);
  kvcache::reshape_and_cache_flash(a, launch.stream);
}

// kv_c, k_pe, cache and slots of the two MLA writes.
kvcache::ConcatMlaArgs check_mla(const Checks& checks, const Arg& kv_c, const Arg& k_pe,
                                 const Arg& cache, const Arg& slots) {
  kvcache::ConcatMlaArgs a{};
  a.dtype = checks.float_dtype(kv_c);
  checks.rank(kv_c, 2, 2);
  checks.last_contiguous(kv_c);
  checks.on_device(k_pe);
  checks.dtype(k_pe, kv_c.dtype);
  checks.rank(k_pe, 2, 2);
  checks.last_contiguous(k_pe);
  a.slots = check_slots(checks, slots, kv_c);
  checks.at_least(k_pe, 0, slots.size(0), "the length of slot_mapping");
  checks.on_device(cache);
  checks.rank(cache, 3, 3);
  checks.last_contiguous(cache);
  a.kv_c = kv_c.data, a.k_pe = k_pe.data, a.cache = cache.data;
  a.tokens = slots.size(0), a.latent = kv_c.size(1), a.rope = k_pe.size(1);
  a.num_blocks = cache.size(0), a.block_size = cache.size(1);
  a.kv_c_stride = kv_c.stride(0), a.k_pe_stride = k_pe.stride(0);
  a.block_stride = cache.stride(0), a.entry_stride = cache.stride(1);
  return a;
}

void concat_and_cache_mla(const Tensor& kv_c_tensor, const Tensor& k_pe_tensor,
                          const Tensor& kv_cache, const Tensor& slot_mapping,
                          const std::string& kv_cache_dtype, const Tensor& scale_tensor,
                          bool skip_scale) {
  const Arg kv_c("kv_c", kv_c_tensor), k_pe("k_pe", k_pe_tensor), cache("kv_cache", kv_cache);
  const Arg slots("slot_mapping", slot_mapping), scale("scale", scale_tensor);
  const Checks checks("concat_and_cache_mla", kv_c);
  kvcache::ConcatMlaArgs a = check_mla(checks, kv_c, k_pe, cache, slots);
  const bool ds = kv_cache_dtype == "fp8_ds_mla";
  if (ds) {
    checks.sixteen_bit(kv_c);
    checks.size(kv_c, 1, kvcache::kDsMlaLatent, "the latent of fp8_ds_mla");
    checks.value(a.rope == 64 || a.rope == 0, "k_pe", a.rope, "64 or 0 columns for fp8_ds_mla");
    const int64_t item = item_bytes(cache);
    checks.value(cache.size(2) * item == kvcache::kDsMlaEntry, "kv_cache", cache.size(2) * item,
                 "an entry of 656 bytes for fp8_ds_mla");
    a.block_stride *= item, a.entry_stride *= item;
    if ((reinterpret_cast<uintptr_t>(a.cache) | a.block_stride | a.entry_stride) % 4 != 0) {
      checks.fail("kv_cache", "a base or stride that is not a multiple of 4 bytes",
                  "4-byte alignment for fp8_ds_mla");
    }
  } else {
    a.format = check_format(checks, kv_cache_dtype, kv_c, cache);
    checks.size(cache, 2, a.latent + a.rope, "latent and rotary part");
  }
  a.scale = check_scale(checks, scale);
  if (skip_scale || a.format == KvFormat::kCopy) a.scale = nullptr;
  if (a.tokens == 0 || cache.numel() == 0) return;
  const Launch launch(kv_c);
  ds ? kvcache::concat_and_cache_ds_mla(a, launch.stream)
     : kvcache::concat_and_cache_mla(a, launch.stream);
}

void concat_and_cache_mla_grouped(const Tensor& kv_c_tensor, const Tensor& k_pe_tensor,
                                  const Tensor& kv_cache_ptrs, const Tensor& slot_mapping,
                                  int64_t block_size, int64_t block_stride, int64_t entry_stride,
                                  const std::optional<Tensor>& kv_scales,
                                  const std::string& kv_cache_dtype) {
  const Arg kv_c("kv_c", kv_c_tensor), k_pe("k_pe", k_pe_tensor);
  const Arg ptrs("kv_cache_ptrs", kv_cache_ptrs), slots("slot_mapping", slot_mapping);
  const Checks checks("concat_and_cache_mla_grouped", kv_c);
  kvcache::ConcatMlaGroupedArgs a{};
  checks.rank(kv_c, 3, 3);
  checks.dtype(kv_c, ScalarType::BFloat16);
  checks.contiguous(kv_c);
  a.layers = kv_c.size(0), a.tokens = kv_c.size(1), a.latent = kv_c.size(2);
  checks.on_device(k_pe);
  checks.dtype(k_pe, kv_c.dtype);
  checks.shape(k_pe, {a.layers, a.tokens, -1});
  checks.contiguous(k_pe);
  a.rope = k_pe.size(2);
  checks.on_device(ptrs);
  checks.dtype(ptrs, ScalarType::Long);
  checks.shape(ptrs, {a.layers});
  checks.contiguous(ptrs);
  checks.on_device(slots);
  checks.dtype(slots, ScalarType::Long);
  checks.shape(slots, {a.layers, a.tokens});
  checks.contiguous(slots);
  checks.value(block_size > 0, "block_size", block_size, "a positive size");
  checks.value(entry_stride >= a.latent + a.rope, "entry_stride", entry_stride,
               "a stride of at least the latent and the rotary part");
  checks.value(block_stride >= 0, "block_stride", block_stride, "a stride of at least 0");
  a.format = kv_cache_dtype == "auto" || kv_cache_dtype == "bfloat16"
                 ? KvFormat::kCopy
                 : parse_fp8(checks, "kv_cache_dtype", kv_cache_dtype);
  if (kv_scales) {
    const Arg scales("kv_scales", *kv_scales);
    checks.on_device(scales);
    checks.dtype(scales, ScalarType::Float);
    checks.shape(scales, {a.layers});
    checks.contiguous(scales);
    a.scales = static_cast<const float*>(scales.data);
  }
  a.kv_c = kv_c.data, a.k_pe = k_pe.data;
  a.cache_ptrs = static_cast<const int64_t*>(ptrs.data);
  a.slots = static_cast<const int64_t*>(slots.data);
  a.block_size = block_size, a.block_stride = block_stride, a.entry_stride = entry_stride;
  if (a.layers * a.tokens == 0) return;
  const Launch launch(kv_c);
  kvcache::concat_and_cache_mla_grouped(a, launch.stream);
}

void concat_and_cache_mla_rope_fused(const Tensor& positions_tensor, const Tensor& q_pe_tensor,
                                     const Tensor& k_pe_tensor, const Tensor& kv_c_tensor,
                                     const Tensor& cos_sin_tensor, bool is_neox,
                                     const Tensor& slot_mapping, const Tensor& kv_cache,
                                     const std::string& kv_cache_dtype,
                                     const Tensor& kv_cache_scale) {
  const Arg kv_c("kv_c", kv_c_tensor), k_pe("k_pe", k_pe_tensor), q_pe("q_pe", q_pe_tensor);
  const Arg positions("positions", positions_tensor), cos_sin("cos_sin_cache", cos_sin_tensor);
  const Arg slots("slot_mapping", slot_mapping), cache("kv_cache", kv_cache);
  const Checks checks("concat_and_cache_mla_rope_fused", kv_c);
  kvcache::ConcatMlaRopeArgs a{};
  a.mla = check_mla(checks, kv_c, k_pe, cache, slots);
  if (kv_cache_dtype == "fp8_ds_mla") {
    checks.fail("kv_cache_dtype", "fp8_ds_mla", "auto, float16, bfloat16, fp8, fp8_e4m3, fp8_e5m2");
  }
  a.mla.format = check_format(checks, kv_cache_dtype, kv_c, cache);
  checks.size(cache, 2, a.mla.latent + a.mla.rope, "latent and rotary part");
  checks.value(a.mla.rope > 0 && a.mla.rope % 2 == 0, "k_pe", a.mla.rope,
               "an even, positive number of columns");
  checks.on_device(positions);
  checks.rank(positions, 1, 1);
  checks.dtype(positions, ScalarType::Long);
  checks.contiguous(positions);
  checks.at_least(positions, 0, a.mla.tokens, "the length of slot_mapping");
  checks.on_device(q_pe);
  checks.dtype(q_pe, kv_c.dtype);
  checks.rank(q_pe, 3, 3);
  checks.size(q_pe, 2, a.mla.rope, "the columns of k_pe");
  checks.at_least(q_pe, 0, a.mla.tokens, "the length of slot_mapping");
  checks.last_contiguous(q_pe);
  checks.on_device(cos_sin);
  checks.dtype(cos_sin, kv_c.dtype);
  checks.shape(cos_sin, {-1, a.mla.rope});
  checks.last_contiguous(cos_sin);
  a.mla.scale = check_scale(checks, Arg("kv_cache_scale", kv_cache_scale));
  if (a.mla.format == KvFormat::kCopy) a.mla.scale = nullptr;
  a.positions = static_cast<const int64_t*>(positions.data);
  a.q_pe = q_pe.data, a.cos_sin = cos_sin.data;
  a.heads = q_pe.size(1);
  a.q_token_stride = q_pe.stride(0), a.q_head_stride = q_pe.stride(1);
  a.max_position = cos_sin.size(0), a.cos_sin_stride = cos_sin.stride(0);
  a.neox = is_neox;
  if (a.mla.tokens == 0 || cache.numel() == 0) return;
  const Launch launch(kv_c);
  kvcache::concat_and_cache_mla_rope_fused(a, launch.stream);
}

void convert_fp8(const Tensor& dst_cache, const Tensor& src_cache, double scale,
                 const std::string& kv_cache_dtype) {
  const Arg dst("output", dst_cache), src("input", src_cache);
  const Checks checks("convert_fp8", src);
  kvcache::ConvertFp8Args a{};
  checks.on_device(dst);
  checks.same_shape(dst, src);
  a.to_fp8 = dst.dtype == ScalarType::Byte;
  if (a.to_fp8) {
    a.dtype = checks.float_dtype(src);
  } else {
    checks.dtype(src, ScalarType::Byte);
    a.dtype = checks.float_dtype(dst);
  }
  checks.contiguous(dst);
  checks.contiguous(src);
  if (kv_cache_dtype == "fp8_ds_mla") {
    checks.fail("kv_dtype", kv_cache_dtype, "fp8, fp8_e4m3 or fp8_e5m2");
  }
  a.format = parse_fp8(checks, "kv_dtype", kv_cache_dtype);
  a.out = dst.data, a.in = src.data, a.n = src.numel();
  a.scale = static_cast<float>(scale);
  if (a.n == 0) return;
  const Launch launch(src);
  kvcache::convert_fp8(a, launch.stream);
}

const int32_t* check_int32(const Checks& checks, const Arg& a, int64_t length) {
  checks.on_device(a);
  checks.dtype(a, ScalarType::Int);
  checks.shape(a, {length});
  checks.contiguous(a);
  return static_cast<const int32_t*>(a.data);
}

// block_table int32 [B, M], cu int32 [B + 1] (or [B] with an open end), seq_starts int32 [B].
kvcache::GatherMap check_map(const Checks& checks, const Arg& table, const Arg& cu,
                             const std::optional<Tensor>& seq_starts, const Arg& cache,
                             int64_t rows, bool open_end) {
  kvcache::GatherMap m{};
  checks.on_device(table);
  checks.dtype(table, ScalarType::Int);
  checks.rank(table, 2, 2);
  checks.last_contiguous(table);
  m.sequences = table.size(0), m.table_width = table.size(1), m.table_stride = table.stride(0);
  m.table = static_cast<const int32_t*>(table.data);
  m.cu = check_int32(checks, cu, m.sequences + (open_end ? 0 : 1));
  if (seq_starts) m.starts = check_int32(checks, Arg("seq_starts", *seq_starts), m.sequences);
  m.rows = rows;
  m.num_blocks = cache.size(0), m.block_size = cache.size(1);
  m.open_end = open_end;
  return m;
}

bool nothing_to_gather(const kvcache::GatherMap& m) {
  return m.rows == 0 || m.sequences == 0 || m.num_blocks == 0 || m.block_size == 0;
}

void gather_and_maybe_dequant_cache(const Tensor& src_tensor, const Tensor& dst_tensor,
                                    const Tensor& block_table, const Tensor& cu_seq_lens,
                                    const Tensor& token_to_seq, int64_t num_tokens,
                                    const std::string& kv_cache_dtype, const Tensor& scale,
                                    const std::optional<Tensor>& seq_starts) {
  const Arg src("src_cache", src_tensor), dst("dst", dst_tensor);
  const Checks checks("gather_and_maybe_dequant_cache", src);
  kvcache::GatherArgs a{};
  checks.rank(src, 3, 3);
  checks.last_contiguous(src);
  checks.on_device(dst);
  checks.shape(dst, {-1, src.size(2)});
  checks.last_contiguous(dst);
  a.dtype = checks.float_dtype(dst);
  a.format = check_format(checks, kv_cache_dtype, dst, src);
  checks.value(num_tokens >= 0, "num_tokens", num_tokens, "a count of at least 0");
  checks.at_least(dst, 0, num_tokens, "num_tokens");
  a.map = check_map(checks, Arg("block_table", block_table), Arg("cu_seq_lens", cu_seq_lens),
                    seq_starts, src, num_tokens, false);
  const Arg to_seq("token_to_seq", token_to_seq);
  checks.on_device(to_seq);
  checks.dtype(to_seq, ScalarType::Int);
  checks.rank(to_seq, 1, 1);
  checks.at_least(to_seq, 0, num_tokens, "num_tokens");
  checks.contiguous(to_seq);
  a.map.seq_of = static_cast<const int32_t*>(to_seq.data);
  a.scale = check_scale(checks, Arg("scale", scale));
  a.src = src.data, a.dst = dst.data;
  a.entry = src.size(2), a.item_bytes = item_bytes(src);
  a.block_stride = src.stride(0), a.entry_stride = src.stride(1), a.dst_stride = dst.stride(0);
  if (nothing_to_gather(a.map) || a.entry == 0) return;
  const Launch launch(src);
  kvcache::gather_cache(a, launch.stream);
}

void cp_gather_cache(const Tensor& src_tensor, const Tensor& dst_tensor, const Tensor& block_table,
                     const Tensor& cu_seq_lens, int64_t batch_size,
                     const std::optional<Tensor>& seq_starts) {
  const Arg src("src_cache", src_tensor), dst("dst", dst_tensor);
  const Checks checks("cp_gather_cache", src);
  kvcache::GatherArgs a{};
  checks.rank(src, 3, 64);
  checks.dense_from(src, 2);
  a.item_bytes = item_bytes(src);
  checks.value(a.item_bytes == 1 || a.item_bytes == 2 || a.item_bytes == 4, "src_cache",
               a.item_bytes, "a dtype of 1, 2 or 4 bytes");
  a.entry = 1;
  for (int64_t d = 2; d < src.dim; ++d) a.entry *= src.size(d);
  checks.on_device(dst);
  checks.dtype(dst, src.dtype);
  bool same = dst.dim == src.dim - 1;
  for (int64_t d = 1; same && d < dst.dim; ++d) same = dst.size(d) == src.size(d + 1);
  if (!same && !(dst.dim == 2 && dst.size(1) == a.entry)) {
    checks.fail("dst", "shape " + dst.shape(),
                "[T] followed by the entry of src_cache, whose shape is " + src.shape() + ",");
  }
  checks.dense_from(dst, 1);
  a.map = check_map(checks, Arg("block_table", block_table), Arg("cu_seq_lens", cu_seq_lens),
                    seq_starts, src, dst.size(0), false);
  checks.value(batch_size == a.map.sequences, "batch_size", batch_size,
               "the number of rows of block_table");
  a.format = KvFormat::kCopy;
  a.src = src.data, a.dst = dst.data;
  a.block_stride = src.stride(0), a.entry_stride = src.stride(1), a.dst_stride = dst.stride(0);
  if (nothing_to_gather(a.map) || a.entry == 0) return;
  const Launch launch(src);
  kvcache::gather_cache(a, launch.stream);
}

void cp_gather_and_upconvert_fp8_kv_cache(const Tensor& src_tensor, const Tensor& dst_tensor,
                                          const Tensor& block_table, const Tensor& workspace_starts,
                                          int64_t batch_size,
                                          const std::optional<Tensor>& seq_starts,
                                          const std::optional<Tensor>& host_cache,
                                          const std::optional<Tensor>& host_row_ids,
                                          const std::optional<Tensor>& device_row_ids) {
  const Arg src("src_cache", src_tensor), dst("dst", dst_tensor);
  const Checks checks("cp_gather_and_upconvert_fp8_kv_cache", src);
  kvcache::GatherUpconvertArgs a{};
  checks.shape(src, {-1, -1, kvcache::kDsMlaEntry});
  if (src.dtype != ScalarType::Byte && src.dtype != ScalarType::Float8_e4m3fn) {
    checks.fail("src_cache", name_of(src.dtype), "uint8 or float8_e4m3fn");
  }
  checks.last_contiguous(src);
  checks.on_device(dst);
  checks.dtype(dst, ScalarType::BFloat16);
  checks.shape(dst, {-1, 576});
  checks.last_contiguous(dst);
  a.map = check_map(checks, Arg("block_table", block_table),
                    Arg("workspace_starts", workspace_starts), seq_starts, src, dst.size(0), true);
  checks.value(batch_size == a.map.sequences, "batch_size", batch_size,
               "the number of rows of block_table");
  a.src = static_cast<const uint8_t*>(src.data), a.dst = dst.data;
  a.src_blocks = src.size(0);
  a.block_stride = src.stride(0), a.entry_stride = src.stride(1), a.dst_stride = dst.stride(0);
  if ((reinterpret_cast<uintptr_t>(src.data) | a.block_stride | a.entry_stride) % 4 != 0) {
    checks.fail("src_cache", "a base or stride that is not a multiple of 4 bytes",
                "4-byte alignment");
  }
  const int given = host_cache.has_value() + host_row_ids.has_value() + device_row_ids.has_value();
  if (given != 0 && given != 3) {
    checks.fail("host_cache", std::to_string(given) + " of the three host arguments",
                "all of host_cache, host_row_ids and device_row_ids, or none,");
  }
  if (given == 3) {
    const Arg host("host_cache", *host_cache), device_rows("device_row_ids", *device_row_ids);
    if (host.device_type != aoti_torch_device_type_cpu()) {
      checks.fail("host_cache", "a tensor on " + device_name(host.device_type, host.device_index),
                  "pinned host memory");
    }
    checks.dtype(host, ScalarType::Byte);
    checks.shape(host, {-1, kvcache::kDsMlaEntry});
    checks.contiguous(host);
    checks.rank(device_rows, 1, 1);
    const int64_t ids = device_rows.size(0);
    a.device_rows = check_int32(checks, device_rows, ids);
    a.host_rows = check_int32(checks, Arg("host_row_ids", *host_row_ids), ids);
    a.host = host_pointer(checks, host);
    a.host_count = host.size(0);
    a.map.num_blocks = a.map.block_size == 0 ? 0 : ids / a.map.block_size;
  }
  if (nothing_to_gather(a.map)) return;
  const Launch launch(src);
  kvcache::gather_and_upconvert_ds_mla(a, launch.stream);
}

void indexer_k_quant_and_cache(const Tensor& k_tensor, const Tensor& kv_cache,
                               const Tensor& slot_mapping, int64_t quant_block_size,
                               const std::string& kv_cache_dtype) {
  const Arg k("k", k_tensor), cache("kv_cache", kv_cache), slots("slot_mapping", slot_mapping);
  const Checks checks("indexer_k_quant_and_cache", k);
  kvcache::IndexerQuantArgs a{};
  a.dtype = checks.sixteen_bit(k);
  checks.rank(k, 2, 2);
  checks.contiguous(k);
  a.head_size = k.size(1), a.group = quant_block_size;
  checks.value((a.group == 32 || a.group == 64 || a.group == 128) && a.head_size % a.group == 0,
               "quant_block_size", a.group, "32, 64 or 128, a divisor of the columns of k,");
  if (kv_cache_dtype == "ue8m0") {
    a.scale_format = kvcache::ScaleFormat::kPowerOfTwo;
  } else if (kv_cache_dtype == "mxfp8") {
    a.scale_format = kvcache::ScaleFormat::kExponentByte;
  } else if (kv_cache_dtype != "fp32" && kv_cache_dtype != "auto") {
    checks.fail("kv_cache_dtype", "\"" + kv_cache_dtype + "\"", "ue8m0, mxfp8, fp32 or auto");
  }
  checks.on_device(cache);
  checks.dtype(cache, ScalarType::Byte);
  checks.shape(cache, {-1, -1, a.head_size + 4 * a.head_size / a.group});
  checks.dense_from(cache, 1);
  a.slots = check_slots(checks, slots, k);
  a.k = k.data, a.cache = static_cast<uint8_t*>(cache.data);
  a.tokens = slots.size(0);
  a.num_blocks = cache.size(0), a.block_size = cache.size(1), a.block_stride = cache.stride(0);
  if (a.tokens == 0 || cache.numel() == 0) return;
  const Launch launch(k);
  kvcache::indexer_k_quant_and_cache(a, launch.stream);
}

void cp_gather_indexer_k_quant_cache(const Tensor& kv_cache, const Tensor& dst_k_tensor,
                                     const Tensor& dst_scale_tensor, const Tensor& block_table,
                                     const Tensor& cu_seq_lens) {
  const Arg cache("kv_cache", kv_cache), dst_k("dst_k", dst_k_tensor);
  const Arg dst_scale("dst_scale", dst_scale_tensor);
  const Checks checks("cp_gather_indexer_k_quant_cache", cache);
  kvcache::IndexerGatherArgs a{};
  checks.dtype(cache, ScalarType::Byte);
  checks.rank(cache, 3, 3);
  checks.dense_from(cache, 1);
  checks.on_device(dst_k);
  checks.rank(dst_k, 2, 2);
  checks.value(item_bytes(dst_k) == 1, "dst_k", item_bytes(dst_k), "a dtype of 1 byte");
  checks.contiguous(dst_k);
  a.head_size = dst_k.size(1);
  checks.value(a.head_size > 0 && a.head_size % 16 == 0, "dst_k", a.head_size,
               "a multiple of 16 columns");
  checks.on_device(dst_scale);
  checks.shape(dst_scale, {dst_k.size(0), -1});
  checks.contiguous(dst_scale);
  a.scale_bytes = dst_scale.size(1) * item_bytes(dst_scale);
  checks.value(a.scale_bytes > 0 && a.scale_bytes % 4 == 0, "dst_scale", a.scale_bytes,
               "a positive multiple of 4 bytes a row");
  checks.size(cache, 2, a.head_size + a.scale_bytes, "codes and scales");
  a.map = check_map(checks, Arg("block_table", block_table), Arg("cu_seq_lens", cu_seq_lens),
                    std::nullopt, cache, dst_k.size(0), false);
  a.cache = static_cast<const uint8_t*>(cache.data);
  a.dst_k = static_cast<uint8_t*>(dst_k.data);
  a.dst_scale = static_cast<uint8_t*>(dst_scale.data);
  a.block_stride = cache.stride(0);
  if (nothing_to_gather(a.map)) return;
  const Launch launch(cache);
  kvcache::gather_indexer(a, launch.stream);
}

// Bytes that a view spans, from its first to its last element.
int64_t span_bytes(const Arg& a) {
  int64_t last = 0;
  for (int64_t d = 0; d < a.dim; ++d) {
    if (a.size(d) == 0) return 0;
    last += (a.size(d) - 1) * a.stride(d);
  }
  return (last + 1) * item_bytes(a);
}

void swap_blocks(const Tensor& src_tensor, const Tensor& dst_tensor, int64_t block_size_in_bytes,
                 const Tensor& block_mapping) {
  const Arg src("src", src_tensor), dst("dst", dst_tensor), map("block_mapping", block_mapping);
  const Checks checks("swap_blocks", src);
  const int64_t bytes = block_size_in_bytes;
  checks.value(bytes > 0, "block_size_in_bytes", bytes, "a positive size");
  if (map.device_type != aoti_torch_device_type_cpu()) {
    checks.fail("block_mapping", "a tensor on " + device_name(map.device_type, map.device_index),
                "a tensor on cpu");
  }
  checks.dtype(map, ScalarType::Long);
  checks.shape(map, {-1, 2});
  kvcache::SwapBlocksArgs a{};
  a.src = src.data, a.dst = dst.data;
  a.pairs = static_cast<const int64_t*>(map.data);
  a.pair_stride = map.stride(0), a.column_stride = map.stride(1);
  a.n = map.size(0), a.bytes = bytes;
  std::vector<int64_t> written;
  for (int64_t i = 0; i < a.n; ++i) {
    const int64_t s = a.pairs[i * a.pair_stride];
    const int64_t d = a.pairs[i * a.pair_stride + a.column_stride];
    if (s < 0 || s >= span_bytes(src) / bytes || d < 0 || d >= span_bytes(dst) / bytes) {
      checks.fail(
          "block_mapping",
          "row " + std::to_string(i) + " = (" + std::to_string(s) + ", " + std::to_string(d) + ")",
          "a source below " + std::to_string(span_bytes(src) / bytes) +
              " and a destination below " + std::to_string(span_bytes(dst) / bytes));
    }
    written.push_back(reinterpret_cast<int64_t>(dst.data) + d * bytes);
  }
  const int64_t s0 = reinterpret_cast<int64_t>(src.data), d0 = reinterpret_cast<int64_t>(dst.data);
  if (s0 < d0 + span_bytes(dst) && d0 < s0 + span_bytes(src)) {  // one memory: look closer
    std::sort(written.begin(), written.end());
    for (int64_t i = 0; i < a.n; ++i) {
      const int64_t at = s0 + a.pairs[i * a.pair_stride] * bytes;
      const auto next = std::upper_bound(written.begin(), written.end(), at - bytes);
      if (next != written.end() && *next < at + bytes) {
        checks.fail("block_mapping", "row " + std::to_string(i) + ", whose source is written too,",
                    "source blocks that overlap no destination block");
      }
    }
  }
  if (a.n == 0) return;
  const Launch launch(src.device_type == aoti_torch_device_type_cpu() ? dst : src);
  kvcache::swap_blocks(a, launch.stream);
}

kvcache::SwapBatchArgs check_batch(const Tensor& src_ptrs, const Tensor& dst_ptrs,
                                   const Tensor& sizes, bool any_order) {
  const Arg src("src_ptrs", src_ptrs), dst("dst_ptrs", dst_ptrs), bytes("sizes", sizes);
  const Checks checks("swap_blocks_batch", src);
  checks.rank(src, 1, 1);
  for (const Arg* a : {&src, &dst, &bytes}) {
    if (a->device_type != aoti_torch_device_type_cpu()) {
      checks.fail(a->name, "a tensor on " + device_name(a->device_type, a->device_index),
                  "a tensor on cpu");
    }
    checks.dtype(*a, ScalarType::Long);
    checks.same_shape(*a, src);
    checks.contiguous(*a);
  }
  kvcache::SwapBatchArgs a{};
  a.src_ptrs = static_cast<const int64_t*>(src.data);
  a.dst_ptrs = static_cast<const int64_t*>(dst.data);
  a.sizes = static_cast<const int64_t*>(bytes.data);
  a.n = src.size(0), a.any_order = any_order;
  for (int64_t i = 0; i < a.n; ++i) {
    checks.value(a.sizes[i] >= 0, "sizes", a.sizes[i], "a size of at least 0");
  }
  return a;
}

}  // namespace
}  // namespace kvcache_glue
