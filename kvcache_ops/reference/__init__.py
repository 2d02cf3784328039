"""Every op in plain torch: the meaning that the native kernels are held against.

Written for correctness, not for speed. Same arguments and the same mutation as the ops; runs on
any device torch has, so the kernels of the CPU and of CUDA are compared with the same lines. No
argument is checked here: that is the native layer's duty.
"""

from __future__ import annotations

from kvcache_ops.reference.attention import (
    merge_attn_states,
    paged_attention,
    paged_attention_v1,
    paged_attention_v2,
)
from kvcache_ops.reference.blocks import convert_fp8, swap_blocks, swap_blocks_batch
from kvcache_ops.reference.cache import (
    concat_and_cache_mla,
    concat_and_cache_mla_grouped,
    concat_and_cache_mla_rope_fused,
    indexer_k_quant_and_cache,
    reshape_and_cache,
    reshape_and_cache_flash,
)
from kvcache_ops.reference.codes import dequantize, fp8_kind, quantize
from kvcache_ops.reference.elementwise import (
    fatrelu_and_mul,
    fused_add_rms_norm,
    gelu_and_mul,
    gelu_tanh_and_mul,
    mul_and_silu,
    rms_norm,
    rotary_embedding,
    silu_and_mul,
    swigluoai_and_mul,
)
from kvcache_ops.reference.gather import (
    cp_gather_and_upconvert_fp8_kv_cache,
    cp_gather_cache,
    cp_gather_indexer_k_quant_cache,
    gather_and_maybe_dequant_cache,
)

__all__ = [
    "concat_and_cache_mla",
    "concat_and_cache_mla_grouped",
    "concat_and_cache_mla_rope_fused",
    "convert_fp8",
    "cp_gather_and_upconvert_fp8_kv_cache",
    "cp_gather_cache",
    "cp_gather_indexer_k_quant_cache",
    "dequantize",
    "fatrelu_and_mul",
    "fp8_kind",
    "fused_add_rms_norm",
    "gather_and_maybe_dequant_cache",
    "gelu_and_mul",
    "gelu_tanh_and_mul",
    "indexer_k_quant_and_cache",
    "merge_attn_states",
    "mul_and_silu",
    "paged_attention",
    "paged_attention_v1",
    "paged_attention_v2",
    "quantize",
    "reshape_and_cache",
    "reshape_and_cache_flash",
    "rms_norm",
    "rotary_embedding",
    "silu_and_mul",
    "swap_blocks",
    "swap_blocks_batch",
    "swigluoai_and_mul",
]
