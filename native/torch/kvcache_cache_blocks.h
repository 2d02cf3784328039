// Blocks moved and converted: tensors checked and turned into the arguments of the kernels.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "kvcache/cache.h"
#include "torch/kvcache_checks.h"

namespace kvcache_glue {
namespace {

// Bytes that a view spans, from its first to its last element.
int64_t span_bytes(const Arg& a) {
  int64_t last = 0;
  for (int64_t d = 0; d < a.dim; ++d) {
    if (a.size(d) == 0) return 0;
    last += (a.size(d) - 1) * a.stride(d);
  }
  return (last + 1) * item_bytes(a);
}

bool share_memory(const Arg& a, const Arg& b) {
  const int64_t at_a = reinterpret_cast<int64_t>(a.data), at_b = reinterpret_cast<int64_t>(b.data);
  return at_a < at_b + span_bytes(b) && at_b < at_a + span_bytes(a);
}

// Item i of one memory becomes item i of the other: both are without holes, and as long as each
// other. Views of one shape also have one order, so that an element becomes the element at its own
// indices.
void check_conversion(const Checks& checks, const Arg& dst, const Arg& src) {
  if (dst.numel() != src.numel()) {
    checks.fail(
        dst.name, "shape " + dst.shape(),
        "as many elements as " + std::string(src.name) + " of shape " + src.shape() + " has");
  }
  if (src.numel() == 0) return;
  for (const Arg* a : {&dst, &src}) {
    if (a->fills_memory()) continue;
    checks.fail(a->name, a->layout(),
                "memory without holes or repeated elements, in any order of dimensions,");
  }
  bool same_shape = dst.dim == src.dim, same_order = true;
  for (int64_t d = 0; same_shape && d < dst.dim; ++d) {
    same_shape = dst.size(d) == src.size(d);
    same_order = same_order && (dst.size(d) == 1 || dst.stride(d) == src.stride(d));
  }
  if (same_shape && !same_order) {
    checks.fail(dst.name, dst.layout(),
                "the strides of " + std::string(src.name) + ", " + src.layout() + ",");
  }
  if (share_memory(dst, src)) {
    checks.fail(dst.name, "memory that " + std::string(src.name) + " lies in too", "other memory");
  }
}

void convert_fp8(const Tensor& dst_cache, const Tensor& src_cache, double scale,
                 const std::string& kv_cache_dtype) {
  const Arg dst("output", dst_cache), src("input", src_cache);
  const Checks checks("convert_fp8", src);
  kvcache::ConvertFp8Args a{};
  checks.on_device(dst);
  a.to_fp8 = dst.dtype == ScalarType::Byte;
  if (a.to_fp8) {
    a.dtype = checks.float_dtype(src);
  } else {
    checks.dtype(src, ScalarType::Byte);
    a.dtype = checks.float_dtype(dst);
  }
  check_conversion(checks, dst, src);
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
  if (share_memory(src, dst)) {  // look closer
    const int64_t s0 = reinterpret_cast<int64_t>(src.data);
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
