// Cache ops over raw pointers: one declaration, defined for the CPU in <op>_cpu.cpp and for CUDA in
// <op>.cu. Strides are in elements of their tensor. The caller has checked shapes and strides; what
// is data (slots, block tables, lengths) is bounded by the kernels, whatever it holds.
#pragma once

#include <cstdint>

#include "prim/dtype.h"

namespace kvcache {

struct ReshapeAndCacheArgs {
  const void *key, *value;
  void *key_cache, *value_cache;
  const int64_t* slots;
  const float *k_scale, *v_scale;
  int64_t tokens, heads, head_size, num_blocks, block_size;
  int64_t key_stride, value_stride;  // per token
  int64_t x;                         // elements of 16 bytes of the key cache
  bool interleaved_v;
  DType dtype;
  KvFormat format;
};
void reshape_and_cache(const ReshapeAndCacheArgs& args, Stream stream);

struct ReshapeAndCacheFlashArgs {
  const void *key, *value;
  void *key_cache, *value_cache;
  const int64_t* slots;
  const float *k_scale, *v_scale;
  int64_t scale_stride;  // 0: one scale, 1: one per head
  int64_t tokens, heads, head_size, num_blocks, block_size;
  int64_t key_stride, value_stride;
  int64_t key_block_stride, key_page_stride, key_head_stride;
  int64_t value_block_stride, value_page_stride, value_head_stride;
  DType dtype;
  KvFormat format;
};
void reshape_and_cache_flash(const ReshapeAndCacheFlashArgs& args, Stream stream);

struct ConcatMlaArgs {
  const void *kv_c, *k_pe;
  void* cache;
  const int64_t* slots;
  const float* scale;  // null: 1
  int64_t tokens, latent, rope, num_blocks, block_size;
  int64_t kv_c_stride, k_pe_stride, block_stride, entry_stride;
  DType dtype;
  KvFormat format;
};
void concat_and_cache_mla(const ConcatMlaArgs& args, Stream stream);
// The 656-byte entry; strides of the cache in bytes.
void concat_and_cache_ds_mla(const ConcatMlaArgs& args, Stream stream);

struct ConcatMlaGroupedArgs {
  const void *kv_c, *k_pe;
  const int64_t* cache_ptrs;
  const int64_t* slots;
  const float* scales;  // null: 1
  int64_t layers, tokens, latent, rope, block_size, block_stride, entry_stride;
  int64_t kv_c_layer_stride, kv_c_stride, k_pe_layer_stride, k_pe_stride;
  int64_t slot_layer_stride, slot_stride;
  KvFormat format;
};
void concat_and_cache_mla_grouped(const ConcatMlaGroupedArgs& args, Stream stream);

struct ConcatMlaRopeArgs {
  ConcatMlaArgs mla;  // k_pe is rotated in place
  const int64_t* positions;
  void* q_pe;
  const void* cos_sin;
  int64_t heads, q_token_stride, q_head_stride, max_position, cos_sin_stride;
  bool neox;
};
void concat_and_cache_mla_rope_fused(const ConcatMlaRopeArgs& args, Stream stream);

struct ConvertFp8Args {
  void* out;
  const void* in;
  int64_t n;
  float scale;
  bool to_fp8;
  DType dtype;  // of the side that is not fp8
  KvFormat format;
};
void convert_fp8(const ConvertFp8Args& args, Stream stream);

// Which entry a row of a dense tensor comes from: row r of sequence b, cu[b] <= r < cu[b + 1], is
// token starts[b] + r - cu[b], entry p % block_size of block table[b, p / block_size].
struct GatherMap {
  const int32_t* table;
  const int32_t* cu;
  const int32_t* starts;  // may be null
  const int32_t* seq_of;  // sequence of each row; null: found in cu
  int64_t sequences, table_width, table_stride;
  int64_t rows;  // of the dense tensor: none past it is written
  int64_t num_blocks, block_size;
  bool open_end;  // cu has no last element: the last sequence ends at `rows`
};

struct GatherArgs {
  GatherMap map;
  const void* src;
  void* dst;
  const float* scale;
  int64_t entry;  // elements
  int64_t block_stride, entry_stride, dst_stride;
  int64_t item_bytes;  // of src, for copies
  DType dtype;         // of dst, for fp8
  KvFormat format;
};
void gather_cache(const GatherArgs& args, Stream stream);

struct GatherUpconvertArgs {
  GatherMap map;
  const uint8_t* src;
  void* dst;
  const uint8_t* host;  // may be null
  const int32_t *host_rows, *device_rows;
  int64_t host_count;
  int64_t block_stride, entry_stride, dst_stride;
  int64_t src_blocks;  // of src; map.num_blocks counts logical blocks when host is given
};
void gather_and_upconvert_ds_mla(const GatherUpconvertArgs& args, Stream stream);

enum class ScaleFormat : int32_t { kFloat32, kPowerOfTwo, kExponentByte };
struct IndexerQuantArgs {
  const void* k;
  uint8_t* cache;
  const int64_t* slots;
  int64_t tokens, head_size, group, num_blocks, block_size, block_stride;
  ScaleFormat scale_format;
  DType dtype;
};
void indexer_k_quant_and_cache(const IndexerQuantArgs& args, Stream stream);

struct IndexerGatherArgs {
  GatherMap map;
  const uint8_t* cache;
  uint8_t *dst_k, *dst_scale;
  int64_t head_size, scale_bytes, block_stride;
};
void gather_indexer(const IndexerGatherArgs& args, Stream stream);

// n copies of `bytes` each between two memories, block pairs (src, dst) in `pairs` on the host.
struct SwapBlocksArgs {
  const void* src;
  void* dst;
  const int64_t* pairs;
  int64_t pair_stride, column_stride;
  int64_t n, bytes;
};
void swap_blocks(const SwapBlocksArgs& args, Stream stream);

struct SwapBatchArgs {
  const int64_t *src_ptrs, *dst_ptrs, *sizes;
  int64_t n;
  bool any_order;
};
void swap_blocks_batch(const SwapBatchArgs& args, Stream stream);

// Scales and codes shared by every device.
inline constexpr int64_t kDsMlaLatent = 512, kDsMlaTile = 128, kDsMlaScales = 512, kDsMlaRope = 528,
                         kDsMlaEntry = 656;

}  // namespace kvcache
