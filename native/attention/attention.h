// Decode attention and the merge of partial results over raw pointers: one declaration, defined for
// the CPU in <op>_cpu.cpp and for CUDA in <op>.cu. Strides are in elements of their tensor.
#pragma once

#include <cstdint>

#include "prim/dtype.h"
#include "prim/host_device.h"

namespace attention {

struct BlockSparse {
  int64_t tp_rank, local_blocks, vert_stride, block_size, head_sliding_step;  // on: vert_stride > 1
};

// Whether query head h attends to token t of a sequence of n.
HOST_DEVICE bool attends(const BlockSparse& b, int64_t h, int64_t heads, int64_t group, int64_t t,
                         int64_t n) {
  if (b.vert_stride <= 1) return true;
  const int64_t off = b.head_sliding_step >= 0
                          ? (b.tp_rank * heads + h) * b.head_sliding_step + 1
                          : (b.tp_rank * (heads / group) + h / group) * -b.head_sliding_step + 1;
  const int64_t kb = t / b.block_size;
  return (kb + off) % b.vert_stride == 0 || kb > (n - 1) / b.block_size - b.local_blocks;
}

struct PagedAttentionArgs {
  void* out;
  float* lse;  // [Hq, S] with these strides, or null
  int64_t lse_head_stride, lse_sequence_stride;
  const void *query, *key_cache, *value_cache;
  const int32_t *tables, *lens;
  const float* alibi;              // [Hq] or null
  const float *k_scale, *v_scale;  // null: 1
  int64_t sequences, heads, kv_heads, head_size;
  int64_t num_blocks, block_size, table_width, table_stride;
  int64_t query_stride, query_head_stride, out_stride, out_head_stride;
  // Flash layout: [NB, BS, Hkv, D]. Packed: K [NB, Hkv, D/x, BS, x], V [NB, Hkv, D, BS], no page
  // stride.
  int64_t k_block_stride, k_page_stride, k_head_stride;
  int64_t v_block_stride, v_page_stride, v_head_stride;
  bool packed;
  int64_t x;
  int64_t longest;  // an upper bound of lens: table_width * block_size, or what the caller says
  float scale, epsilon;
  DType dtype;
  KvFormat format;
  BlockSparse sparse;
  // paged_attention_v2: partitions of 512 tokens, written out; null otherwise.
  void* tmp_out;
  float *max_logits, *exp_sums;
  int64_t partitions;  // of the three tensors
  void* scratch;       // paged_attention_scratch bytes, aligned to 16
};
void paged_attention(const PagedAttentionArgs& args, Stream stream);

// What a GPU needs besides: bytes of scratch for the partial results (0 where none is needed).
int64_t paged_attention_scratch(const PagedAttentionArgs& args);

struct MergeArgs {
  void* out;
  float* out_lse;  // may be null
  const void *prefix, *suffix;
  const float *prefix_lse, *suffix_lse;
  const float* out_scale;  // e4m3 output; null: the dtype of the inputs
  int64_t tokens, heads, head_size, with_prefix;
  int64_t out_stride, out_head_stride, prefix_stride, prefix_head_stride, suffix_stride,
      suffix_head_stride;
  // LSE tensors are [H, N].
  int64_t out_lse_stride0, out_lse_stride1, prefix_lse_stride0, prefix_lse_stride1,
      suffix_lse_stride0, suffix_lse_stride1;
  DType dtype;
};
void merge_attn_states(const MergeArgs& args, Stream stream);

}  // namespace attention
