"""The cache ops on tensors of a usual size, for the case ops_cpu."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import plain
from .case import (
    HEAD,
    HIDDEN,
    KV_HEADS,
    LATENT,
    MAX_POSITION,
    MLA_HEADS,
    ROPE,
    SIXTEEN,
    Case,
    angles,
    cache_blocks,
    case,
    error_of,
    one,
    randn,
    size,
    slots,
)
from .plain import BF16, BLOCK, F32, LAYERS, SCALE, U8


def writes(n: int, dtype: torch.dtype) -> Iterator[Case]:
    key, value = (randn(n, KV_HEADS, HEAD, dtype=dtype) for _ in range(2))
    blocks = cache_blocks(n)
    for kv in ("auto", "fp8"):
        dt = U8 if kv == "fp8" else dtype
        common = dict(
            key=key,
            value=value,
            slot_mapping=slots(n),
            kv_cache_dtype=kv,
            k_scale=one(),
            v_scale=one(),
        )
        x = 16 // dt.itemsize
        packed = (blocks, KV_HEADS, HEAD // x, BLOCK, x), (blocks, KV_HEADS, HEAD, BLOCK)
        flash = (blocks, BLOCK, KV_HEADS, HEAD)
        for op, (k_shape, v_shape) in (
            ("reshape_and_cache", packed),
            ("reshape_and_cache_flash", (flash, flash)),
        ):
            caches = dict(
                key_cache=torch.zeros(k_shape, dtype=dt), value_cache=torch.zeros(v_shape, dtype=dt)
            )
            yield case(
                op,
                dtype,
                dict(common, **caches),
                written=("key_cache", "value_cache"),
                moved=2 * (size(key) + key.numel() * dt.itemsize),
                variant=kv,
            )


def mla_writes(n: int, dtype: torch.dtype) -> Iterator[Case]:
    kv_c, k_pe = randn(n, LATENT, dtype=dtype), randn(n, ROPE, dtype=dtype)
    blocks, mapping, entry = cache_blocks(n), slots(n), LATENT + ROPE
    common = dict(kv_c=kv_c, k_pe=k_pe, slot_mapping=mapping, scale=one())
    for kv in ("auto", "fp8", "fp8_ds_mla"):
        ds = kv == "fp8_ds_mla"
        if ds and dtype == F32:
            continue
        width = 656 if ds else entry
        cache = torch.zeros(blocks, BLOCK, width, dtype=dtype if kv == "auto" else U8)
        yield case(
            "concat_and_cache_mla",
            dtype,
            dict(common, kv_cache=cache, kv_cache_dtype=kv),
            plain=plain.concat_and_cache_ds_mla if ds else plain.concat_and_cache_mla,
            written=("kv_cache",),
            moved=size(kv_c, k_pe) + n * width * cache.itemsize,
            variant=kv,
        )
    q_pe = randn(n, MLA_HEADS, ROPE, dtype=dtype)
    yield case(
        "concat_and_cache_mla_rope_fused",
        dtype,
        dict(
            positions=torch.randint(0, MAX_POSITION, (n,)),
            q_pe=q_pe,
            k_pe=k_pe.clone(),
            kv_c=kv_c,
            cos_sin_cache=angles(ROPE, dtype),
            is_neox=True,
            slot_mapping=mapping,
            kv_cache=torch.zeros(blocks, BLOCK, entry, dtype=dtype),
            kv_cache_dtype="auto",
            kv_cache_scale=one(),
        ),
        written=("q_pe", "k_pe", "kv_cache"),
        moved=2 * size(q_pe, k_pe, kv_c) + size(k_pe),
        tolerance=error_of(dtype),
    )
    if dtype == BF16:
        yield grouped(n)


def grouped(n: int) -> Case:
    inputs = dict(
        kv_c=randn(LAYERS, n, LATENT, dtype=BF16),
        k_pe=randn(LAYERS, n, ROPE, dtype=BF16),
        slot_mapping=torch.stack([slots(n) for _ in range(LAYERS)]),
    )
    caches = torch.zeros(LAYERS, cache_blocks(n), BLOCK, LATENT + ROPE, dtype=BF16)
    pointers = dict(
        kv_cache_ptrs=torch.tensor([c.data_ptr() for c in caches]),
        block_size=BLOCK,
        block_stride=caches.stride(1),
        entry_stride=caches.stride(2),
    )
    return case(
        "concat_and_cache_mla_grouped",
        BF16,
        dict(inputs, **pointers),
        written=("caches",),
        moved=2 * size(inputs["kv_c"], inputs["k_pe"]),
        other=dict(inputs, caches=caches),
    )


def block_tables(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Up to four sequences that make up n tokens: table, cumulative lengths, sequence of each."""
    count = min(n, 4)
    lens = torch.full((count,), n // count)
    cu = torch.zeros(count + 1, dtype=torch.int32)
    cu[1:] = lens.cumsum(0)
    width = -(-(n // count) // BLOCK)
    table = torch.randperm(count * width).view(count, width).int()
    return table, cu, torch.arange(count).repeat_interleave(lens).int()


def gathers(n: int, dtype: torch.dtype) -> Iterator[Case]:
    table, cu, sequence = block_tables(n)
    blocks, entry = table.numel(), LATENT + ROPE
    for kv in ("auto", "fp8"):
        cache = randn(blocks, BLOCK, entry, dtype=dtype)
        if kv == "fp8":
            cache = plain.quantized(cache)
        dst = torch.zeros(n, entry, dtype=dtype)
        maps = dict(src_cache=cache, dst=dst, block_table=table, cu_seq_lens=cu)
        moved = n * entry * (cache.itemsize + dtype.itemsize)
        format = dict(token_to_seq=sequence, num_tokens=n, kv_cache_dtype=kv, scale=one())
        yield case(
            "gather_and_maybe_dequant_cache",
            dtype,
            dict(maps, **format),
            written=("dst",),
            moved=moved,
            variant=kv,
        )
        if kv == "auto":
            tensors = dict(maps, batch_size=table.shape[0])
            yield case("cp_gather_cache", dtype, tensors, written=("dst",), moved=moved)


def sparse_gathers(n: int) -> Iterator[Case]:
    table, cu, _ = block_tables(n)
    blocks = table.numel()
    codes = plain.quantized(torch.randn(blocks, BLOCK, 656))
    codes[:, :, 512:528] = torch.rand(blocks, BLOCK, 4).add(0.5).view(U8)
    yield case(
        "cp_gather_and_upconvert_fp8_kv_cache",
        BF16,
        dict(
            src_cache=codes,
            dst=torch.zeros(n, LATENT + ROPE, dtype=BF16),
            block_table=table,
            workspace_starts=cu[:-1].clone(),
            batch_size=table.shape[0],
        ),
        written=("dst",),
        moved=n * (656 + 576 * 2),
    )
    cache = torch.randint(0, 256, (blocks, BLOCK, HEAD + 4), dtype=U8)
    maps = dict(
        dst_k=torch.zeros(n, HEAD, dtype=U8),
        dst_scale=torch.zeros(n, 4, dtype=U8),
        block_table=table,
        cu_seq_lens=cu,
    )
    yield case(
        "cp_gather_indexer_k_quant_cache",
        U8,
        dict(maps, kv_cache=cache),
        written=("dst_k", "dst_scale"),
        moved=2 * n * (HEAD + 4),
        other=dict(maps, **indexer_views(cache)),
    )


def indexer_views(cache: Tensor) -> dict[str, Tensor]:
    flat = cache.flatten(1)
    codes, scales = flat[:, : BLOCK * HEAD], flat[:, BLOCK * HEAD :]
    views = dict(codes_of=codes, scales_of=scales)
    return {name: view.unflatten(1, (BLOCK, -1)) for name, view in views.items()}


def indexer_write(n: int, dtype: torch.dtype) -> Iterator[Case]:
    cache = torch.zeros(cache_blocks(n), BLOCK, HEAD + 4, dtype=U8)
    inputs = dict(k=randn(n, HEAD, dtype=dtype), slot_mapping=slots(n))
    yield case(
        "indexer_k_quant_and_cache",
        dtype,
        dict(inputs, kv_cache=cache, quant_block_size=HEAD, kv_cache_dtype="fp32"),
        written=("kv_cache",),
        moved=size(inputs["k"]) + n * (HEAD + 4),
        other=dict(inputs, **indexer_views(cache)),
    )


def conversions(n: int, dtype: torch.dtype) -> Iterator[Case]:
    x = randn(n, HIDDEN, dtype=dtype)
    codes = plain.quantized(x)
    for variant, output, given, theirs in (
        ("to", torch.zeros_like(codes), x, plain.to_fp8),
        ("from", torch.zeros_like(x), codes, plain.from_fp8),
    ):
        tensors = dict(output=output, input=given, scale=SCALE, kv_dtype="fp8")
        yield case(
            "convert_fp8",
            dtype,
            tensors,
            plain=theirs,
            written=("output",),
            moved=size(x, codes),
            variant=variant,
        )


def swaps(n: int, dtype: torch.dtype) -> Iterator[Case]:
    """The blocks that n tokens fill."""
    count = max(1, n // BLOCK)
    src = randn(count + 1, BLOCK, KV_HEADS, HEAD, dtype=dtype)
    dst = torch.zeros_like(src)
    mapping = torch.stack([torch.randperm(count + 1)[:count] for _ in range(2)], dim=1)
    tensors = dict(src=src, dst=dst, block_mapping=mapping)
    block = size(src[0])
    bounds = dict(written=("dst",), moved=2 * count * block)
    yield case("swap_blocks", dtype, dict(tensors, block_size_in_bytes=block), **bounds)
    pointers = dict(
        src_ptrs=src.data_ptr() + mapping[:, 0] * block,
        dst_ptrs=dst.data_ptr() + mapping[:, 1] * block,
        sizes=torch.full((count,), block),
    )
    more = dict(bounds, plain=plain.swap_blocks, other=tensors)
    yield case("swap_blocks_batch", dtype, pointers, **more)


def cache_cases(n: int, dtype: torch.dtype) -> Iterator[Case]:
    yield from writes(n, dtype)
    yield from mla_writes(n, dtype)
    yield from conversions(n, dtype)
    yield from gathers(n, dtype)
    if dtype in SIXTEEN:
        yield from indexer_write(n, dtype)
    if dtype == BF16:
        yield from sparse_gathers(n)
    yield from swaps(n, dtype)
