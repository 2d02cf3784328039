// What the cache ops check alike: formats, slots and scales.
#pragma once

#include <string>

#include "kvcache/cache.h"
#include "torch/kvcache_checks.h"

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

}  // namespace
}  // namespace kvcache_glue
