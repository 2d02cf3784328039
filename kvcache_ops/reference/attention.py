"""Decode attention and its merge, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvcache_ops.reference.codes import dequantize, fp8_kind, quantize


def _contiguous_kv(key_cache: Tensor, value_cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [n_blocks * BS, Hkv, D] of the given blocks, from either cache layout."""
    k, v = key_cache[blocks], value_cache[blocks]
    if key_cache.dim() == 5:  # packed: K [NB, H, D/x, BS, x], V [NB, H, D, BS]
        k = k.permute(0, 3, 1, 2, 4).flatten(3)
        v = v.permute(0, 3, 1, 2)
    return k.flatten(0, 1), v.flatten(0, 1)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    bias: Tensor | None,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One sequence: query [Hq, D], key and value [n, Hkv, D] -> (out fp32, max, sum of exps)."""
    groups = query.shape[0] // key.shape[1]
    k = key.float().repeat_interleave(groups, dim=1)
    v = value.float().repeat_interleave(groups, dim=1)
    logits = torch.einsum("hd,nhd->hn", query.float(), k) * scale
    if bias is not None:
        logits = logits + bias
    if keep is not None:
        logits = logits.masked_fill(~keep, -torch.finfo(torch.float32).max)
    largest = logits.amax(-1)
    p = torch.exp(logits - largest.unsqueeze(-1))
    total = p.sum(-1)
    p = (p / (total + 1e-6).unsqueeze(-1)).to(query.dtype).float()
    return torch.einsum("hn,nhd->hd", p, v), largest, total


def _sparse_keep(
    n: int,
    heads: int,
    groups: int,
    tp_rank: int,
    local_blocks: int,
    vert_stride: int,
    sparse_block: int,
    sliding_step: int,
    device: torch.device,
) -> Tensor | None:
    """[Hq, n] true where a query head attends, or None when nothing is masked."""
    if vert_stride <= 1:
        return None
    head = torch.arange(heads, device=device)
    if sliding_step >= 0:
        offset = (tp_rank * heads + head) * sliding_step + 1
    else:
        offset = (tp_rank * (heads // groups) + head // groups) * -sliding_step + 1
    block = torch.arange(n, device=device) // sparse_block
    remote = (block.unsqueeze(0) + offset.unsqueeze(1)) % vert_stride == 0
    local = block > (n - 1) // sparse_block - local_blocks
    return remote | local.unsqueeze(0)


def paged_attention(
    out: Tensor,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    *,
    out_lse: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    for s, n in enumerate(seq_lens[: query.shape[0]].tolist()):
        if n <= 0:
            out[s] = 0
            if out_lse is not None:
                out_lse[:, s] = -math.inf
            continue
        key, value = _sequence_kv(
            query, key_cache, value_cache, block_tables[s], 0, n, kv_cache_dtype, k_scale, v_scale
        )
        bias = _alibi(alibi_slopes, 0, n, n)
        o, largest, total = _attend(query[s], key, value, scale, bias, None)
        out[s] = o.to(out.dtype)
        if out_lse is not None:
            out_lse[:, s] = largest + total.log()


def _alibi(slopes: Tensor | None, first: int, last: int, n: int) -> Tensor | None:
    if slopes is None:
        return None
    distance = torch.arange(first, last, device=slopes.device) - n + 1
    return slopes.unsqueeze(1) * distance


def _sequence_kv(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    table: Tensor,
    first: int,
    last: int,
    kv_cache_dtype: str,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Dequantized keys and values [last - first, Hkv, D]; ``first`` on a block boundary."""
    bs = key_cache.shape[3] if key_cache.dim() == 5 else key_cache.shape[1]
    blocks = table[first // bs : (last + bs - 1) // bs].long()
    k, v = _contiguous_kv(key_cache, value_cache, blocks)
    kind = fp8_kind(kv_cache_dtype)
    k = dequantize(k[: last - first], 1.0 if k_scale is None else k_scale, kind, query.dtype)
    v = dequantize(v[: last - first], 1.0 if v_scale is None else v_scale, kind, query.dtype)
    return k, v


def paged_attention_v1(
    out: Tensor,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    num_kv_heads: int,
    scale: float,
    block_tables: Tensor,
    seq_lens: Tensor,
    block_size: int,
    max_seq_len: int,
    alibi_slopes: Tensor | None,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
    tp_rank: int = 0,
    blocksparse_local_blocks: int = 0,
    blocksparse_vert_stride: int = 0,
    blocksparse_block_size: int = 64,
    blocksparse_head_sliding_step: int = 0,
) -> None:
    heads = query.shape[1]
    for s, n in enumerate(seq_lens[: query.shape[0]].tolist()):
        if n <= 0:
            out[s] = 0
            continue
        key, value = _sequence_kv(
            query, key_cache, value_cache, block_tables[s], 0, n, kv_cache_dtype, k_scale, v_scale
        )
        keep = _sparse_keep(
            n,
            heads,
            heads // num_kv_heads,
            tp_rank,
            blocksparse_local_blocks,
            blocksparse_vert_stride,
            blocksparse_block_size,
            blocksparse_head_sliding_step,
            query.device,
        )
        bias = _alibi(alibi_slopes, 0, n, n)
        out[s] = _attend(query[s], key, value, scale, bias, keep)[0].to(out.dtype)


def paged_attention_v2(
    out: Tensor,
    exp_sums: Tensor,
    max_logits: Tensor,
    tmp_out: Tensor,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    num_kv_heads: int,
    scale: float,
    block_tables: Tensor,
    seq_lens: Tensor,
    block_size: int,
    max_seq_len: int,
    alibi_slopes: Tensor | None,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
    tp_rank: int = 0,
    blocksparse_local_blocks: int = 0,
    blocksparse_vert_stride: int = 0,
    blocksparse_block_size: int = 64,
    blocksparse_head_sliding_step: int = 0,
) -> None:
    heads = query.shape[1]
    for s, n in enumerate(seq_lens[: query.shape[0]].tolist()):
        if n <= 0:
            out[s] = 0
            continue
        keep = _sparse_keep(
            n,
            heads,
            heads // num_kv_heads,
            tp_rank,
            blocksparse_local_blocks,
            blocksparse_vert_stride,
            blocksparse_block_size,
            blocksparse_head_sliding_step,
            query.device,
        )
        parts = (n + 511) // 512
        for j in range(parts):
            first, last = j * 512, min(n, (j + 1) * 512)
            key, value = _sequence_kv(
                query,
                key_cache,
                value_cache,
                block_tables[s],
                first,
                last,
                kv_cache_dtype,
                k_scale,
                v_scale,
            )
            bias = _alibi(alibi_slopes, first, last, n)
            part_keep = None if keep is None else keep[:, first:last]
            o, largest, total = _attend(query[s], key, value, scale, bias, part_keep)
            tmp_out[s, :, j] = o.to(tmp_out.dtype)
            max_logits[s, :, j] = largest
            exp_sums[s, :, j] = total
        if parts == 1:
            out[s] = tmp_out[s, :, 0]
            continue
        weight = exp_sums[s, :, :parts] * torch.exp(
            max_logits[s, :, :parts] - max_logits[s, :, :parts].amax(-1, keepdim=True)
        )
        merged = (tmp_out[s, :, :parts].float() * weight.unsqueeze(-1)).sum(1)
        out[s] = (merged / (weight.sum(-1, keepdim=True) + 1e-6)).to(out.dtype)


def merge_attn_states(
    output: Tensor,
    prefix_output: Tensor,
    prefix_lse: Tensor,
    suffix_output: Tensor,
    suffix_lse: Tensor,
    output_lse: Tensor | None = None,
    prefill_tokens_with_context: int | None = None,
    output_scale: Tensor | None = None,
) -> None:
    n = output.shape[0]
    split = n if prefill_tokens_with_context is None else prefill_tokens_with_context
    p = torch.where(prefix_lse == math.inf, -math.inf, prefix_lse)
    s = torch.where(suffix_lse == math.inf, -math.inf, suffix_lse)
    m = torch.maximum(p, s)
    a, b = torch.exp(p - m), torch.exp(s - m)
    weight = lambda w: (w / (a + b)).t().unsqueeze(-1)  # noqa: E731
    merged = prefix_output.float() * weight(a) + suffix_output.float() * weight(b)
    empty = m == -math.inf
    merged = torch.where(empty.t().unsqueeze(-1), prefix_output.float(), merged)
    lse = torch.where(empty, -math.inf, torch.log(a + b) + m)
    without = torch.arange(n, device=output.device) >= split
    merged = torch.where(without.view(-1, 1, 1), suffix_output.float(), merged)
    lse = torch.where(without, suffix_lse, lse)
    if output_scale is not None:
        codes = quantize(merged * (1.0 / output_scale), 1.0, "e4m3")
        output.view(torch.uint8).copy_(codes)
    else:
        output.copy_(merged.to(output.dtype))
    if output_lse is not None:
        output_lse.copy_(lse)
