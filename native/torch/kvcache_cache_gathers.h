// Gathers out of the paged cache: tensors checked and turned into the arguments of the kernels.
#pragma once

#include <optional>
#include <string>

#include "kvcache/cache.h"
#include "torch/kvcache_cache_checks.h"

namespace kvcache_glue {
namespace {

const int32_t* check_int32(const Checks& checks, const Arg& a, int64_t least, const char* what) {
  checks.on_device(a);
  checks.dtype(a, ScalarType::Int);
  checks.rank(a, 1, 1);
  checks.at_least(a, 0, least, what);
  checks.contiguous(a);
  return static_cast<const int32_t*>(a.data);
}

// The B sequences of a gather: cu int32 [B + 1], or its first B elements with an open end; at least
// B rows of block_table int32 [.., M] and of seq_starts int32 [..], as padded batches have them.
kvcache::GatherMap check_map(const Checks& checks, const Arg& table, const Arg& cu,
                             const std::optional<Tensor>& seq_starts, const Arg& cache,
                             int64_t rows, std::optional<int64_t> open_sequences = {}) {
  kvcache::GatherMap m{};
  m.open_end = open_sequences.has_value();
  m.cu = check_int32(checks, cu, open_sequences.value_or(1), "the number of sequences");
  m.sequences = open_sequences.value_or(cu.size(0) - 1);
  checks.on_device(table);
  checks.dtype(table, ScalarType::Int);
  checks.rank(table, 2, 2);
  checks.at_least(table, 0, m.sequences, "the number of sequences");
  checks.last_contiguous(table);
  m.table_width = table.size(1), m.table_stride = table.stride(0);
  m.table = static_cast<const int32_t*>(table.data);
  if (seq_starts) {
    m.starts =
        check_int32(checks, Arg("seq_starts", *seq_starts), m.sequences, "the number of sequences");
  }
  m.rows = rows;
  m.num_blocks = cache.size(0), m.block_size = cache.size(1);
  return m;
}

// Of all entries, or entries in rows of one block each.
const int32_t* check_row_ids(const Checks& checks, const Arg& ids) {
  checks.on_device(ids);
  checks.dtype(ids, ScalarType::Int);
  checks.rank(ids, 1, 2);
  checks.contiguous(ids);
  return static_cast<const int32_t*>(ids.data);
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
                    seq_starts, src, num_tokens);
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
                    seq_starts, src, dst.size(0));
  checks.value(batch_size == a.map.sequences, "batch_size", batch_size,
               "one less than the length of cu_seq_lens");
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
  const Arg starts("workspace_starts", workspace_starts);
  checks.value(batch_size >= 0 && (starts.dim != 1 || batch_size <= starts.size(0)), "batch_size",
               batch_size, "a count of 0 to the length of workspace_starts");
  a.map = check_map(checks, Arg("block_table", block_table), starts, seq_starts, src, dst.size(0),
                    batch_size);
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
    const Arg host("host_cache", *host_cache), host_rows("host_row_ids", *host_row_ids);
    const Arg device_rows("device_row_ids", *device_row_ids);
    if (host.device_type != aoti_torch_device_type_cpu()) {
      checks.fail("host_cache", "a tensor on " + device_name(host.device_type, host.device_index),
                  "pinned host memory");
    }
    checks.dtype(host, ScalarType::Byte);
    checks.shape(host, {-1, kvcache::kDsMlaEntry});
    checks.contiguous(host);
    a.device_rows = check_row_ids(checks, device_rows);
    a.host_rows = check_row_ids(checks, host_rows);
    checks.same_shape(host_rows, device_rows);
    const int64_t ids = device_rows.numel();
    a.host = host_pointer(checks, host);
    a.host_count = host.size(0);
    a.map.num_blocks = a.map.block_size == 0 ? 0 : ids / a.map.block_size;
  }
  if (nothing_to_gather(a.map)) return;
  const Launch launch(src);
  kvcache::gather_and_upconvert_ds_mla(a, launch.stream);
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
                    std::nullopt, cache, dst_k.size(0));
  a.cache = static_cast<const uint8_t*>(cache.data);
  a.dst_k = static_cast<uint8_t*>(dst_k.data);
  a.dst_scale = static_cast<uint8_t*>(dst_scale.data);
  a.block_stride = cache.stride(0);
  if (nothing_to_gather(a.map)) return;
  const Launch launch(cache);
  kvcache::gather_indexer(a, launch.stream);
}

}  // namespace
}  // namespace kvcache_glue
