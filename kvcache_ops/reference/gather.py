"""Gathers out of the paged cache, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcache_ops.reference.cache import indexer_views
from kvcache_ops.reference.codes import dequantize, fp8_kind


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
    for b, start in enumerate(starts[: len(cu) - 1]):
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
    cu = torch.cat([workspace_starts[:batch_size], end])
    rows_of = src.reshape(nb * bs, src.shape[2])
    if host_cache is None or host_row_ids is None or device_row_ids is None:
        r, b, off = _gather_rows(block_table, cu, seq_starts, dst.shape[0], bs, nb)
        dst[r] = _ds_mla_upconvert(rows_of[b * bs + off])
        return
    num_ids = device_row_ids.numel()
    r, b, off = _gather_rows(block_table, cu, seq_starts, dst.shape[0], bs, num_ids // bs)
    device_rows, host_rows = device_row_ids.flatten().tolist(), host_row_ids.flatten().tolist()
    for row, i in zip(r.tolist(), (b * bs + off).tolist(), strict=True):
        on_device, on_host = device_rows[i], host_rows[i]
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


def cp_gather_indexer_k_quant_cache(
    kv_cache: Tensor, dst_k: Tensor, dst_scale: Tensor, block_table: Tensor, cu_seq_lens: Tensor
) -> None:
    nb, bs = kv_cache.shape[:2]
    codes_of, scales_of = indexer_views(kv_cache, dst_k.shape[1])
    r, b, off = _gather_rows(block_table, cu_seq_lens, None, dst_k.shape[0], bs, nb)
    dst_k.view(torch.uint8)[r] = codes_of[b, off]
    dst_scale.view(torch.uint8)[r] = scales_of[b, off]
