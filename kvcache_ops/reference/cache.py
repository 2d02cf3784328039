"""Writes into the paged cache, in plain torch."""

from __future__ import annotations

import ctypes
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcache_ops.reference.codes import fp8_kind, quantize
from kvcache_ops.reference.elementwise import rotate


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
    q_pe[t] = rotate(q_pe[t], cos.unsqueeze(1), sin.unsqueeze(1), is_neox)
    k_pe[t] = rotate(k_pe[t], cos, sin, is_neox)
    entry = torch.cat([kv_c[t], k_pe[t]], dim=1)
    kv_cache[b, off] = quantize(entry, kv_cache_scale, fp8_kind(kv_cache_dtype))


def indexer_views(kv_cache: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
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
    codes_of, scales_of = indexer_views(kv_cache, d)
    codes_of[b, off] = codes
    scales_of[b, off] = scale_bytes
