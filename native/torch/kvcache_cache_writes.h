// Writes into the paged cache: tensors checked and turned into the arguments of the kernels.
#pragma once

#include <optional>
#include <string>

#include "kvcache/cache.h"
#include "torch/kvcache_cache_checks.h"

namespace kvcache_glue {
namespace {

// Both are [tokens, heads, head_size] of one dtype, which is returned; heads are contiguous.
inline DType check_keys_and_values(const Checks& checks, const Arg& key, const Arg& value) {
  const DType dtype = checks.float_dtype(key);
  checks.rank(key, 3, 3);
  checks.dense_from(key, 1);
  checks.on_device(value);
  checks.dtype(value, key.dtype);
  checks.same_shape(value, key);
  checks.dense_from(value, 1);
  return dtype;
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
  a.dtype = check_keys_and_values(checks, key, value);
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
  a.dtype = check_keys_and_values(checks, key, value);
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
  if (k_scale.numel() != 1 && k_scale.numel() != a.heads) {
    checks.fail("k_scale", "shape " + k_scale.shape(),
                "one element or " + std::to_string(a.heads) + ", one a head,");
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
  checks.last_contiguous(kv_c);
  a.layers = kv_c.size(0), a.tokens = kv_c.size(1), a.latent = kv_c.size(2);
  checks.on_device(k_pe);
  checks.dtype(k_pe, kv_c.dtype);
  checks.shape(k_pe, {a.layers, a.tokens, -1});
  checks.last_contiguous(k_pe);
  a.rope = k_pe.size(2);
  checks.on_device(ptrs);
  checks.dtype(ptrs, ScalarType::Long);
  checks.shape(ptrs, {a.layers});
  checks.contiguous(ptrs);
  checks.on_device(slots);
  checks.dtype(slots, ScalarType::Long);
  checks.shape(slots, {a.layers, a.tokens});
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
    if (scales.numel() != a.layers) {
      checks.fail("kv_scales", "shape " + scales.shape(),
                  std::to_string(a.layers) + " elements, one a layer,");
    }
    checks.contiguous(scales);
    a.scales = static_cast<const float*>(scales.data);
  }
  a.kv_c = kv_c.data, a.k_pe = k_pe.data;
  a.cache_ptrs = static_cast<const int64_t*>(ptrs.data);
  a.slots = static_cast<const int64_t*>(slots.data);
  a.block_size = block_size, a.block_stride = block_stride, a.entry_stride = entry_stride;
  a.kv_c_layer_stride = kv_c.stride(0), a.kv_c_stride = kv_c.stride(1);
  a.k_pe_layer_stride = k_pe.stride(0), a.k_pe_stride = k_pe.stride(1);
  a.slot_layer_stride = slots.stride(0), a.slot_stride = slots.stride(1);
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

}  // namespace
}  // namespace kvcache_glue
