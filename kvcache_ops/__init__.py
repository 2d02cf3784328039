"""KV-cache, attention, norm, RoPE and activation ops of tensor-parallel inference.

Importing touches no GPU, no environment variable and no file; the native library is loaded by the
first call, by the first use of `torch.ops.kvcache_ops.<op>`, or by load(). See docs/ops.md for
every op's contract.
"""

from kvcache_ops._native import load as load
from kvcache_ops.activation import (
    fatrelu_and_mul,
    gelu_and_mul,
    gelu_tanh_and_mul,
    mul_and_silu,
    silu_and_mul,
    swigluoai_and_mul,
)
from kvcache_ops.attention import (
    merge_attn_states,
    paged_attention,
    paged_attention_v1,
    paged_attention_v2,
)
from kvcache_ops.blocks import convert_fp8, swap_blocks, swap_blocks_batch
from kvcache_ops.cache import (
    concat_and_cache_mla,
    concat_and_cache_mla_grouped,
    concat_and_cache_mla_rope_fused,
    indexer_k_quant_and_cache,
    reshape_and_cache,
    reshape_and_cache_flash,
)
from kvcache_ops.gather import (
    cp_gather_and_upconvert_fp8_kv_cache,
    cp_gather_cache,
    cp_gather_indexer_k_quant_cache,
    gather_and_maybe_dequant_cache,
)
from kvcache_ops.norm import fused_add_rms_norm, rms_norm
from kvcache_ops.rope import rotary_embedding

__all__ = [
    "concat_and_cache_mla",
    "concat_and_cache_mla_grouped",
    "concat_and_cache_mla_rope_fused",
    "convert_fp8",
    "cp_gather_and_upconvert_fp8_kv_cache",
    "cp_gather_cache",
    "cp_gather_indexer_k_quant_cache",
    "fatrelu_and_mul",
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
    "reshape_and_cache",
    "reshape_and_cache_flash",
    "rms_norm",
    "rotary_embedding",
    "silu_and_mul",
    "swap_blocks",
    "swap_blocks_batch",
    "swigluoai_and_mul",
]
