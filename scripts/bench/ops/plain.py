"""Each kvcache op as one would write it in plain torch, for the case ops_cpu to time.

It takes no care of padding or of slots and blocks outside the cache, and has the layout of every
view worked out beforehand: it may only be quicker for that. A function leaves its result where the
op does, or returns it where torch has no way to write there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK, LAYERS = 16, 4
F32, BF16, U8 = torch.float32, torch.bfloat16, torch.uint8
E4M3 = torch.float8_e4m3fn
SCALE = 0.37  # of every fp8 cache


def quantized(x: Tensor, scale: Tensor | float = SCALE) -> Tensor:
    return (x.float() / scale).clamp(-448, 448).to(E4M3).view(U8)


def restored(codes: Tensor, dtype: torch.dtype, scale: Tensor | float = SCALE) -> Tensor:
    return (codes.view(E4M3).float() * scale).to(dtype)


def stored(x: Tensor, cache: Tensor) -> Tensor:
    return quantized(x) if cache.dtype == U8 else x


def rms_norm(input: Tensor, weight: Tensor, epsilon: float, **_: Any) -> Tensor:
    return F.rms_norm(input, (input.shape[-1],), weight, epsilon)


def fused_add_rms_norm(input: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> None:
    residual.add_(input)
    input.copy_(F.rms_norm(residual, (input.shape[-1],), weight, epsilon))


def rotary_embedding(
    positions: Tensor, query: Tensor, key: Tensor, cos_sin_cache: Tensor, **_: Any
) -> None:
    cos, sin = cos_sin_cache[positions].unsqueeze(1).chunk(2, dim=-1)
    for x in (query, key):
        a, b = x.chunk(2, dim=-1)
        x.copy_(torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1))


def silu_and_mul(result: Tensor, input: Tensor) -> None:
    x, y = input.chunk(2, dim=-1)
    torch.mul(F.silu(x), y, out=result)


def mul_and_silu(out: Tensor, input: Tensor) -> None:
    x, y = input.chunk(2, dim=-1)
    torch.mul(x, F.silu(y), out=out)


def gelu_and_mul(out: Tensor, input: Tensor) -> None:
    x, y = input.chunk(2, dim=-1)
    torch.mul(F.gelu(x), y, out=out)


def gelu_tanh_and_mul(out: Tensor, input: Tensor) -> None:
    x, y = input.chunk(2, dim=-1)
    torch.mul(F.gelu(x, approximate="tanh"), y, out=out)


def fatrelu_and_mul(out: Tensor, input: Tensor, threshold: float) -> None:
    x, y = input.chunk(2, dim=-1)
    torch.mul(F.threshold(x, threshold, 0.0), y, out=out)


def swigluoai_and_mul(out: Tensor, input: Tensor, alpha: float, limit: float) -> None:
    gate = input[..., ::2].clamp(max=limit)
    up = input[..., 1::2].clamp(min=-limit, max=limit)
    torch.mul(up + 1, gate * torch.sigmoid(gate * alpha), out=out)


def reshape_and_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    **_: Any,
) -> None:
    block, off = slot_mapping // BLOCK, slot_mapping % BLOCK
    chunks = stored(key, key_cache).unflatten(2, (-1, key_cache.shape[-1]))
    key_cache[block, :, :, off] = chunks
    value_cache[block, :, :, off] = stored(value, value_cache)


def reshape_and_cache_flash(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    **_: Any,
) -> None:
    key_cache.flatten(0, 1)[slot_mapping] = stored(key, key_cache)
    value_cache.flatten(0, 1)[slot_mapping] = stored(value, value_cache)


def concat_and_cache_mla(
    kv_c: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor, **_: Any
) -> None:
    entry = torch.cat([kv_c, k_pe], dim=1)
    kv_cache.flatten(0, 1)[slot_mapping] = stored(entry, kv_cache)


def concat_and_cache_ds_mla(
    kv_c: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor, **_: Any
) -> None:
    tiles = kv_c.float().unflatten(1, (4, 128))
    amax = tiles.abs().amax(-1, keepdim=True)
    scale = torch.exp2(torch.ceil(torch.log2((amax / 448).clamp_min(1e-4))))
    codes = quantized(tiles, scale).flatten(1)
    entry = torch.cat([codes, scale.flatten(1).view(U8), k_pe.view(U8)], dim=1)
    kv_cache.flatten(0, 1)[slot_mapping] = entry


def concat_and_cache_mla_grouped(
    kv_c: Tensor, k_pe: Tensor, caches: Tensor, slot_mapping: Tensor
) -> None:
    for layer in range(LAYERS):
        entry = torch.cat([kv_c[layer], k_pe[layer]], dim=1)
        caches[layer].flatten(0, 1)[slot_mapping[layer]] = entry


def concat_and_cache_mla_rope_fused(
    positions: Tensor,
    q_pe: Tensor,
    k_pe: Tensor,
    kv_c: Tensor,
    cos_sin_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    **_: Any,
) -> None:
    rotary_embedding(positions, q_pe, k_pe.unsqueeze(1), cos_sin_cache)
    concat_and_cache_mla(kv_c, k_pe, kv_cache, slot_mapping)


def to_fp8(output: Tensor, input: Tensor, **_: Any) -> Tensor:
    return quantized(input)


def from_fp8(output: Tensor, input: Tensor, **_: Any) -> Tensor:
    return restored(input, output.dtype)


def rows_of(block_table: Tensor, cu: Tensor, sequence: Tensor, n: int) -> Tensor:
    """The cache entry of each of n gathered rows."""
    p = torch.arange(n) - cu[sequence]
    return block_table[sequence, p // BLOCK] * BLOCK + p % BLOCK


def gather_and_maybe_dequant_cache(
    src_cache: Tensor,
    dst: Tensor,
    block_table: Tensor,
    cu_seq_lens: Tensor,
    token_to_seq: Tensor,
    num_tokens: int,
    **_: Any,
) -> Tensor | None:
    rows = rows_of(block_table, cu_seq_lens, token_to_seq, num_tokens)
    if src_cache.dtype != U8:
        torch.index_select(src_cache.flatten(0, 1), 0, rows, out=dst)
        return None
    return restored(src_cache.flatten(0, 1)[rows], dst.dtype)


def sequences_of(cu: Tensor, n: int) -> Tensor:
    return torch.searchsorted(cu[1:], torch.arange(n, dtype=cu.dtype), right=True)


def cp_gather_cache(
    src_cache: Tensor, dst: Tensor, block_table: Tensor, cu_seq_lens: Tensor, **_: Any
) -> None:
    n = dst.shape[0]
    rows = rows_of(block_table, cu_seq_lens, sequences_of(cu_seq_lens, n), n)
    torch.index_select(src_cache.flatten(0, 1), 0, rows, out=dst)


def cp_gather_and_upconvert_fp8_kv_cache(
    src_cache: Tensor, dst: Tensor, block_table: Tensor, workspace_starts: Tensor, **_: Any
) -> None:
    n = dst.shape[0]
    sequence = torch.searchsorted(
        workspace_starts, torch.arange(n, dtype=torch.int32), right=True
    ).sub(1)
    entry = src_cache.flatten(0, 1)[rows_of(block_table, workspace_starts, sequence, n)]
    scale = entry[:, 512:528].view(F32).unsqueeze(-1)
    latent = entry[:, :512].unflatten(1, (4, 128))
    dst[:, :512] = restored(latent, BF16, scale).flatten(1)
    dst[:, 512:] = entry[:, 528:].view(BF16)


def indexer_k_quant_and_cache(
    k: Tensor, codes_of: Tensor, scales_of: Tensor, slot_mapping: Tensor
) -> None:
    block, off = slot_mapping // BLOCK, slot_mapping % BLOCK
    x = k.float()
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-4) / 448
    codes_of[block, off] = quantized(x, scale)
    scales_of[block, off] = scale.view(U8)


def cp_gather_indexer_k_quant_cache(
    codes_of: Tensor,
    scales_of: Tensor,
    dst_k: Tensor,
    dst_scale: Tensor,
    block_table: Tensor,
    cu_seq_lens: Tensor,
) -> None:
    n = dst_k.shape[0]
    rows = rows_of(block_table, cu_seq_lens, sequences_of(cu_seq_lens, n), n)
    block, off = rows // BLOCK, rows % BLOCK
    dst_k.copy_(codes_of[block, off])
    dst_scale.copy_(scales_of[block, off])


def swap_blocks(src: Tensor, dst: Tensor, block_mapping: Tensor, **_: Any) -> None:
    dst[block_mapping[:, 1]] = src[block_mapping[:, 0]]


def merge_attn_states(
    output: Tensor,
    prefix_output: Tensor,
    prefix_lse: Tensor,
    suffix_output: Tensor,
    suffix_lse: Tensor,
    output_lse: Tensor,
) -> None:
    top = torch.maximum(prefix_lse, suffix_lse)
    a, b = torch.exp(prefix_lse - top), torch.exp(suffix_lse - top)
    share = (a / (a + b)).t().unsqueeze(-1)
    torch.add(prefix_output * share, suffix_output * (1 - share), out=output)
    torch.add(top, torch.log(a + b), out=output_lse)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Key and value [S, Hkv, n, D]."""
    out = F.scaled_dot_product_attention(
        query.unsqueeze(2), key, value, scale=scale, enable_gqa=True
    )
    return out.squeeze(2)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    scale: float,
    **_: Any,
) -> Tensor:
    k, v = key_cache[block_tables], value_cache[block_tables]
    if key_cache.dtype == U8:
        k, v = restored(k, query.dtype), restored(v, query.dtype)
    k, v = (x.flatten(1, 2).transpose(1, 2) for x in (k, v))
    return attend(query, k, v, scale)


def paged_attention_packed(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    scale: float,
    **_: Any,
) -> Tensor:
    k = key_cache[block_tables].permute(0, 2, 1, 4, 3, 5).flatten(4).flatten(2, 3)
    v = value_cache[block_tables].permute(0, 2, 1, 4, 3).flatten(2, 3)
    return attend(query, k, v, scale)
