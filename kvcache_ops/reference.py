"""Every op in plain torch: the meaning that the native kernels are held against.

Written for correctness, not for speed. Same arguments and the same mutation as the ops; runs on
any device torch has, so the kernels of the CPU and of CUDA are compared with the same lines. No
argument is checked here: that is the native layer's duty.
"""

from __future__ import annotations

import ctypes
import math

import torch
import torch.nn.functional as F
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The largest finite values of the OCP 8-bit formats (Open Compute Project, OFP8, revision 1.0).
_FP8 = {"e4m3": (torch.float8_e4m3fn, 448.0), "e5m2": (torch.float8_e5m2, 57344.0)}
_KINDS = {
    "auto": None,
    "float16": None,
    "bfloat16": None,
    "fp8": "e4m3",
    "fp8_e4m3": "e4m3",
    "fp8_ds_mla": "e4m3",
    "fp8_e5m2": "e5m2",
}


def fp8_kind(kv_cache_dtype: str) -> str | None:
    """None for a copy, else "e4m3" or "e5m2"."""
    return _KINDS[kv_cache_dtype]


def quantize(x: Tensor, scale: Tensor | float, kind: str | None) -> Tensor:
    """uint8 codes of ``x / scale``: rounded to nearest even, saturated; NaN stays NaN.

    The sign bit is that of the quotient for a NaN too. ``kind`` None returns x as it is.
    """
    if kind is None:
        return x
    dtype, largest = _FP8[kind]
    quotient = x.float() / scale
    codes = quotient.clamp(-largest, largest).to(dtype).view(torch.uint8)
    # Of the bits: torch's conversion of a half that is NaN keeps its sign only in whole vectors.
    sign = x.view({2: torch.int16, 4: torch.int32}[x.itemsize]) < 0
    if isinstance(scale, Tensor):
        sign = sign ^ torch.signbit(scale)
    nan = torch.where(sign, 0xFF, 0x7F).to(torch.uint8)
    return torch.where(quotient.isnan(), nan, codes)


def dequantize(
    codes: Tensor, scale: Tensor | float, kind: str | None, dtype: torch.dtype
) -> Tensor:
    """``round_to_dtype(fp32(half(code)) * scale)``; ``kind`` None returns the input as it is."""
    if kind is None:
        return codes
    half = codes.view(_FP8[kind][0]).to(torch.float16)
    return (half.float() * scale).to(dtype)


# --- cache ----------------------------------------------------------------------------------------


def swap_blocks(src: Tensor, dst: Tensor, block_size_in_bytes: int, block_mapping: Tensor) -> None:
    def bytes_of(t: Tensor) -> Tensor:
        whole = torch.empty(0, dtype=torch.uint8, device=t.device)
        return whole.set_(
            t.untyped_storage(), t.storage_offset() * t.itemsize, (t.numel() * t.itemsize,), (1,)
        )

    src_bytes, dst_bytes, n = bytes_of(src), bytes_of(dst), block_size_in_bytes
    for s, d in block_mapping.tolist():
        dst_bytes[d * n : (d + 1) * n].copy_(src_bytes[s * n : (s + 1) * n])


def swap_blocks_batch(
    src_ptrs: Tensor, dst_ptrs: Tensor, sizes: Tensor, is_src_access_order_any: bool = False
) -> None:
    for s, d, n in zip(src_ptrs.tolist(), dst_ptrs.tolist(), sizes.tolist(), strict=True):
        ctypes.memmove(d, s, n)


def _valid(slot_mapping: Tensor, num_blocks: int, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(token, block, offset) of the tokens whose slot lies in the cache."""
    keep = (slot_mapping >= 0) & (slot_mapping < num_blocks * block_size)
    tokens = keep.nonzero().flatten()
    slots = slot_mapping[tokens]
    return tokens, slots // block_size, slots % block_size


def reshape_and_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
    interleaved_v: bool = False,
) -> None:
    kind = fp8_kind(kv_cache_dtype)
    nb, h, _, bs, x = key_cache.shape
    d = key.shape[2]
    t, b, off = _valid(slot_mapping, nb, bs)
    key_cache[b, :, :, off] = quantize(key[t], k_scale, kind).reshape(-1, h, d // x, x)
    v = quantize(value[t], v_scale, kind)
    if interleaved_v:
        value_cache.view(nb, h, bs // x, d, x)[b, :, off // x, :, off % x] = v
    else:
        value_cache[b, :, :, off] = v


def reshape_and_cache_flash(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    kind = fp8_kind(kv_cache_dtype)
    t, b, off = _valid(slot_mapping, key_cache.shape[0], key_cache.shape[1])
    for src, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        cache[b, off] = quantize(src[t], scale.view(-1, 1), kind)


def concat_and_cache_mla(
    kv_c: Tensor,
    k_pe: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    scale: Tensor,
    skip_scale: bool = False,
) -> None:
    t, b, off = _valid(slot_mapping, kv_cache.shape[0], kv_cache.shape[1])
    if kv_cache_dtype == "fp8_ds_mla":
        kv_cache.view(torch.uint8)[b, off] = _ds_mla_entries(kv_c[t], k_pe[t])
        return
    entry = torch.cat([kv_c[t], k_pe[t]], dim=1)
    kind = fp8_kind(kv_cache_dtype)
    kv_cache[b, off] = quantize(entry, 1.0 if skip_scale else scale, kind)


def _power_of_two_at_least(x: Tensor) -> Tensor:
    """2^ceil(log2(x)) for positive normal fp32, exact: a mantissa bit carries upwards."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)


def _over_448(x: Tensor) -> Tensor:
    """x / 448, truly divided: by a plain number, torch multiplies with the reciprocal on CUDA."""
    return x / torch.full_like(x, 448.0)


def _amax(groups: Tensor) -> Tensor:
    """Largest magnitude of the last dim; a NaN among the values is passed over."""
    return torch.nan_to_num(groups.abs(), nan=0.0, posinf=math.inf).amax(-1)


def _ds_mla_entries(kv_c: Tensor, k_pe: Tensor) -> Tensor:
    tiles = kv_c.float().view(-1, 4, 128)
    scale = _power_of_two_at_least(_over_448(_amax(tiles)).clamp_min(1e-4))
    codes = quantize(tiles, scale.unsqueeze(-1), "e4m3").view(-1, 512)
    rope = k_pe.contiguous().view(torch.uint8)
    rope = F.pad(rope, (0, 128 - rope.shape[1]))
    return torch.cat([codes, scale.contiguous().view(torch.uint8), rope], dim=1)


def concat_and_cache_mla_grouped(
    kv_c: Tensor,
    k_pe: Tensor,
    kv_cache_ptrs: Tensor,
    slot_mapping: Tensor,
    block_size: int,
    block_stride: int,
    entry_stride: int,
    kv_scales: Tensor | None = None,
    kv_cache_dtype: str = "auto",
) -> None:
    kind = fp8_kind(kv_cache_dtype)
    for layer, base in enumerate(kv_cache_ptrs.tolist()):
        for token, slot in enumerate(slot_mapping[layer].tolist()):
            if slot < 0:
                continue
            entry = torch.cat([kv_c[layer, token], k_pe[layer, token]])
            scale = 1.0 if kv_scales is None else kv_scales[layer]
            entry = quantize(entry, scale, kind).contiguous()
            at = slot // block_size * block_stride + slot % block_size * entry_stride
            ctypes.memmove(
                base + at * entry.itemsize, entry.data_ptr(), entry.numel() * entry.itemsize
            )


def concat_and_cache_mla_rope_fused(
    positions: Tensor,
    q_pe: Tensor,
    k_pe: Tensor,
    kv_c: Tensor,
    cos_sin_cache: Tensor,
    is_neox: bool,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    kv_cache_dtype: str,
    kv_cache_scale: Tensor,
) -> None:
    t, b, off = _valid(slot_mapping, kv_cache.shape[0], kv_cache.shape[1])
    cos, sin = cos_sin_cache[positions[t]].float().chunk(2, dim=-1)
    q_pe[t] = _rotate(q_pe[t], cos.unsqueeze(1), sin.unsqueeze(1), is_neox)
    k_pe[t] = _rotate(k_pe[t], cos, sin, is_neox)
    entry = torch.cat([kv_c[t], k_pe[t]], dim=1)
    kv_cache[b, off] = quantize(entry, kv_cache_scale, fp8_kind(kv_cache_dtype))


def convert_fp8(output: Tensor, input: Tensor, scale: float = 1.0, kv_dtype: str = "fp8") -> None:
    kind = fp8_kind(kv_dtype)
    # The host's double becomes fp32 once, as the kernels take it.
    fp32_scale = torch.tensor(scale, dtype=torch.float32, device=input.device)
    if output.dtype == torch.uint8:
        output.copy_(quantize(input, fp32_scale, kind))
    else:
        output.copy_(dequantize(input, fp32_scale, kind, output.dtype))


def _gather_rows(
    block_table: Tensor,
    cu_seq_lens: Tensor,
    seq_starts: Tensor | None,
    limit: int,
    block_size: int,
    num_blocks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dst row, physical block, offset) of every token whose block is known and in the cache."""
    rows, blocks, offsets = [], [], []
    cu, table = cu_seq_lens.tolist(), block_table.tolist()
    starts = [0] * (len(cu) - 1) if seq_starts is None else seq_starts.tolist()
    for b, start in enumerate(starts):
        first, last = max(cu[b], 0), min(cu[b + 1], limit)
        for row in range(first, last):
            p = start + row - cu[b]
            logical = p // block_size
            if p < 0 or logical >= block_table.shape[1]:
                continue
            physical = table[b][logical]
            if 0 <= physical < num_blocks:
                rows.append(row)
                blocks.append(physical)
                offsets.append(p % block_size)
    device = block_table.device
    as_index = lambda x: torch.tensor(x, dtype=torch.int64, device=device)  # noqa: E731
    return as_index(rows), as_index(blocks), as_index(offsets)


def gather_and_maybe_dequant_cache(
    src_cache: Tensor,
    dst: Tensor,
    block_table: Tensor,
    cu_seq_lens: Tensor,
    token_to_seq: Tensor,
    num_tokens: int,
    kv_cache_dtype: str,
    scale: Tensor,
    seq_starts: Tensor | None = None,
) -> None:
    nb, bs = src_cache.shape[:2]
    r, b, off = _gather_rows(block_table, cu_seq_lens, seq_starts, num_tokens, bs, nb)
    dst[r] = dequantize(src_cache[b, off], scale, fp8_kind(kv_cache_dtype), dst.dtype)


def cp_gather_cache(
    src_cache: Tensor,
    dst: Tensor,
    block_table: Tensor,
    cu_seq_lens: Tensor,
    batch_size: int,
    seq_starts: Tensor | None = None,
) -> None:
    nb, bs = src_cache.shape[:2]
    r, b, off = _gather_rows(block_table, cu_seq_lens, seq_starts, dst.shape[0], bs, nb)
    dst[r] = src_cache[b, off]


def cp_gather_and_upconvert_fp8_kv_cache(
    src_cache: Tensor,
    dst: Tensor,
    block_table: Tensor,
    workspace_starts: Tensor,
    batch_size: int,
    seq_starts: Tensor | None = None,
    host_cache: Tensor | None = None,
    host_row_ids: Tensor | None = None,
    device_row_ids: Tensor | None = None,
) -> None:
    src = src_cache.view(torch.uint8)
    nb, bs = src.shape[:2]
    end = torch.tensor([dst.shape[0]], dtype=torch.int32, device=dst.device)
    cu = torch.cat([workspace_starts, end])
    rows_of = src.reshape(nb * bs, src.shape[2])
    if host_cache is None or host_row_ids is None or device_row_ids is None:
        r, b, off = _gather_rows(block_table, cu, seq_starts, dst.shape[0], bs, nb)
        dst[r] = _ds_mla_upconvert(rows_of[b * bs + off])
        return
    num_ids = device_row_ids.numel()
    r, b, off = _gather_rows(block_table, cu, seq_starts, dst.shape[0], bs, num_ids // bs)
    for row, i in zip(r.tolist(), (b * bs + off).tolist(), strict=True):
        on_device, on_host = int(device_row_ids[i]), int(host_row_ids[i])
        if 0 <= on_device < rows_of.shape[0]:
            dst[row] = _ds_mla_upconvert(rows_of[on_device : on_device + 1])[0]
        elif on_device < 0 and 0 <= on_host < host_cache.shape[0]:
            entry = host_cache[on_host : on_host + 1].to(dst.device)
            dst[row] = _ds_mla_upconvert(entry)[0]


def _ds_mla_upconvert(entries: Tensor) -> Tensor:
    entries = entries.contiguous()
    scale = entries[:, 512:528].contiguous().view(torch.float32)
    tiles = entries[:, :512].contiguous().view(-1, 4, 128)
    latent = dequantize(tiles, scale.unsqueeze(-1), "e4m3", torch.bfloat16).view(-1, 512)
    return torch.cat([latent, entries[:, 528:656].contiguous().view(torch.bfloat16)], dim=1)


def _indexer_views(kv_cache: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """(codes [NB, BS, D], scale bytes [NB, BS, 4*D/qb]) inside the blocks of an indexer cache."""
    nb, bs, entry = kv_cache.shape
    stride = kv_cache.stride(0)
    flat = kv_cache.as_strided((nb, bs * entry), (stride, 1))
    codes = flat[:, : bs * head_dim]
    scales = flat[:, bs * head_dim :]
    return (
        codes.as_strided((nb, bs, head_dim), (stride, head_dim, 1), codes.storage_offset()),
        scales.as_strided(
            (nb, bs, entry - head_dim), (stride, entry - head_dim, 1), scales.storage_offset()
        ),
    )


def indexer_k_quant_and_cache(
    k: Tensor, kv_cache: Tensor, slot_mapping: Tensor, quant_block_size: int, kv_cache_dtype: str
) -> None:
    t, b, off = _valid(slot_mapping, kv_cache.shape[0], kv_cache.shape[1])
    d = k.shape[1]
    groups = k[t].float().view(-1, d // quant_block_size, quant_block_size)
    scale = _over_448(_amax(groups).clamp_min(1e-4))
    if kv_cache_dtype in ("ue8m0", "mxfp8"):
        scale = _power_of_two_at_least(scale)
    codes = quantize(groups, scale.unsqueeze(-1), "e4m3").view(-1, d)
    if kv_cache_dtype == "mxfp8":
        exponent = (scale.contiguous().view(torch.int32) >> 23).to(torch.uint8)
        scale_bytes = exponent.repeat_interleave(4, dim=1)
    else:
        scale_bytes = scale.contiguous().view(torch.uint8)
    codes_of, scales_of = _indexer_views(kv_cache, d)
    codes_of[b, off] = codes
    scales_of[b, off] = scale_bytes


def cp_gather_indexer_k_quant_cache(
    kv_cache: Tensor, dst_k: Tensor, dst_scale: Tensor, block_table: Tensor, cu_seq_lens: Tensor
) -> None:
    nb, bs = kv_cache.shape[:2]
    codes_of, scales_of = _indexer_views(kv_cache, dst_k.shape[1])
    r, b, off = _gather_rows(block_table, cu_seq_lens, None, dst_k.shape[0], bs, nb)
    dst_k.view(torch.uint8)[r] = codes_of[b, off]
    dst_scale.view(torch.uint8)[r] = scales_of[b, off]


# --- attention ------------------------------------------------------------------------------------


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
    for s, n in enumerate(seq_lens.tolist()):
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
    for s, n in enumerate(seq_lens.tolist()):
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
    for s, n in enumerate(seq_lens.tolist()):
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


# --- norm, RoPE, activation -----------------------------------------------------------------------


def _weight_rows(weight: Tensor | None, x: Tensor) -> Tensor | float:
    if weight is None:
        return 1.0
    if weight.dim() == 1:
        return weight.float()
    return weight.float().view(weight.shape[0], *([1] * (x.dim() - 2)), weight.shape[1])


def rms_norm(out: Tensor, input: Tensor, weight: Tensor | None, epsilon: float) -> None:
    x = input.float()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    out.copy_((normed * _weight_rows(weight, input)).to(out.dtype).view(out.shape))


def fused_add_rms_norm(
    input: Tensor, residual: Tensor, weight: Tensor | None, epsilon: float
) -> None:
    z = (input.float() + residual.float()).to(input.dtype)
    residual.copy_(z)
    rms_norm(input, z, weight, epsilon)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, is_neox: bool) -> Tensor:
    """x [..., rot] with cos and sin [..., rot/2] in fp32, rounded once to x.dtype."""
    if is_neox:
        a, b = x.float().chunk(2, dim=-1)
    else:
        a, b = x[..., ::2].float(), x[..., 1::2].float()
    first, second = (a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype)
    if is_neox:
        return torch.cat([first, second], dim=-1)
    return torch.stack([first, second], dim=-1).flatten(-2)


def rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool,
    rope_dim_offset: int = 0,
    inverse: bool = False,
) -> None:
    rot = cos_sin_cache.shape[1]
    cos, sin = cos_sin_cache[positions].float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), (-sin if inverse else sin).unsqueeze(-2)
    for x in (query, key):
        if x is None:
            continue
        flat = x.dim() == positions.dim() + 1
        heads = x.unflatten(-1, (-1, head_size)) if flat else x
        part = heads[..., rope_dim_offset : rope_dim_offset + rot]
        part.copy_(_rotate(part, cos, sin, is_neox))


def silu_and_mul(result: Tensor, input: Tensor) -> None:
    x, y = input.chunk(2, dim=-1)
    result.copy_(F.silu(x.float()).to(x.dtype) * y)


def mul_and_silu(out: Tensor, input: Tensor) -> None:
    x, y = input.chunk(2, dim=-1)
    out.copy_(x * F.silu(y.float()).to(y.dtype))


def gelu_and_mul(out: Tensor, input: Tensor) -> None:
    x, y = input.chunk(2, dim=-1)
    out.copy_(F.gelu(x.double()).float().to(x.dtype) * y)


def gelu_tanh_and_mul(out: Tensor, input: Tensor) -> None:
    x, y = input.chunk(2, dim=-1)
    out.copy_(F.gelu(x.double(), approximate="tanh").float().to(x.dtype) * y)


def fatrelu_and_mul(out: Tensor, input: Tensor, threshold: float) -> None:
    x, y = input.chunk(2, dim=-1)
    out.copy_(torch.where(x.float() > threshold, x, torch.zeros_like(x)) * y)


def swigluoai_and_mul(out: Tensor, input: Tensor, alpha: float = 1.702, limit: float = 7.0) -> None:
    gate = input[..., ::2].float().clamp(max=limit)
    up = input[..., 1::2].float().clamp(min=-limit, max=limit)
    out.copy_(((up + 1) * gate * torch.sigmoid(alpha * gate)).to(out.dtype))
