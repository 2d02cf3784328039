// The cache ops. One text for both devices; each library registers it under its own key.
#pragma once

#include <torch/csrc/stable/library.h>

#include "torch/kvcache_cache_blocks.h"
#include "torch/kvcache_cache_gathers.h"
#include "torch/kvcache_cache_writes.h"

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
