"""Cases of decode attention and of the merge of partial results."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tests.unit.ops.cases_cache import cache_dtype, flash_cache, text
from tests.unit.ops.ops_maker import F32, FLOATS, ONE_ULP, U8, Args, Case, Maker


def fill(m: Maker, cache: Tensor, kv: str) -> Tensor:
    """Ordinary values in a cache (fp8 values of them for fp8 caches)."""
    if cache.dtype == U8:
        fmt = torch.float8_e5m2 if kv == "fp8_e5m2" else torch.float8_e4m3fn
        values = torch.randn(cache.shape, generator=m.generator)
        cache.copy_(values.to(fmt).view(U8))
    else:
        cache.copy_(torch.randn(cache.shape, generator=m.generator).to(cache.dtype))
    return cache


def block_tables(m: Maker, lens: list[int], nb: int, bs: int) -> Tensor:
    """Different blocks for every sequence; garbage past the end of each."""
    width = max(-(-n // bs) for n in lens) + 2
    free = m.random.sample(range(nb), nb)
    table = [[m.random.choice((-7, 1 << 30)) for _ in range(width)] for _ in lens]
    for row, n in zip(table, lens, strict=True):
        for i in range(-(-n // bs)):
            row[i] = free.pop()
    return m.ints(table, torch.int32)


def spoil(m: Maker, cache: Tensor, table: Tensor, lens: list[int], bs: int, packed: bool) -> None:
    """NaN and inf in the slots past the end of each sequence's last block."""
    if cache.dtype == U8:
        bad: float = 0x7F
    else:
        bad = math.nan
    for row, n in zip(table.tolist(), lens, strict=True):
        if n % bs:
            block = cache[row[n // bs]]
            if not packed:
                block[n % bs :] = bad
            elif block.dim() == 4:  # key [H, D/x, BS, x]
                block[:, :, n % bs :] = bad
            else:
                block[..., n % bs :] = bad


LENGTHS = [[1], [0, 5, 33], [17, 0, 64, 200, 3], [700, 1030], [2500]]


def paged_args(
    m: Maker,
    lens: list[int],
    hq: int,
    hkv: int,
    bs: int,
    d: int,
    dtype: torch.dtype,
    kv: str,
    layout: str,
    alibi: bool,
) -> Args:
    """Arguments of paged_attention over caches of a flash layout, full of what must not be read."""
    nb = sum(-(-n // bs) for n in lens) + 1
    table = block_tables(m, lens, nb, bs)
    caches = []
    for seed in (5, 6):
        around = Maker(seed, torch.device("cpu"))
        cache = flash_cache(around, layout, nb, bs, hkv, d, cache_dtype(dtype, kv))
        fill(m, cache, kv)
        spoil(m, cache, table, lens, bs, packed=False)
        caches.append(m.put(cache))
    query = m.normal(len(lens), hq, d + 8, dtype=dtype)[:, :, :d]
    return dict(
        out=m.poison(len(lens), hq, d, dtype=dtype),
        query=query,
        key_cache=caches[0],
        value_cache=caches[1],
        block_tables=table,
        seq_lens=m.ints(lens, torch.int32),
        scale=d**-0.5,
        out_lse=m.poison(hq, len(lens)),
        alibi_slopes=m.normal(hq, std=0.1) if alibi else None,
        kv_cache_dtype=kv,
        k_scale=m.floats(0.5) if kv != "auto" else None,
        v_scale=m.floats(1.3) if kv != "auto" else None,
    )


def _paged() -> Iterator[Case]:
    heads = [(1, 1), (8, 1), (8, 2), (6, 6), (32, 8), (128, 8), (5, 1)]
    for i, (lens, (hq, hkv), bs, d) in enumerate(
        itertools.product(LENGTHS, heads, (1, 16, 64), (64, 128, 40, 256))
    ):
        if i % 3 and d != 128:  # every third of the full product, and all of head size 128
            continue
        if max(lens) > 1000 and hq * d > 4096:
            continue
        dtype = FLOATS[i % 3]
        kv = ("auto", "fp8", "auto", "fp8_e5m2")[i // 3 % 4]
        layout = ("NHD", "HND", "interleaved", "padded")[i // 7 % 4]

        def build(
            m: Maker,
            lens: list[int] = lens,
            hq: int = hq,
            hkv: int = hkv,
            bs: int = bs,
            d: int = d,
            dtype: torch.dtype = dtype,
            kv: str = kv,
            layout: str = layout,
            alibi: bool = i % 5 == 0,
        ) -> Args:
            return paged_args(m, lens, hq, hkv, bs, d, dtype, kv, layout, alibi)

        name = text(dtype, kv, layout, sum(lens), hq, hkv, bs, d)
        # Probabilities are rounded to the dtype in another order, and the sum cancels; a bias of
        # some hundred costs fp32 logits 1e-5 each. The GPU keeps codes unrounded times their scale.
        atol = 6e-5 if dtype == F32 else (1.0 if kv == "auto" else 1.5) * ONE_ULP[dtype]
        yield Case("paged_attention", name, build, 31, 2.0, atol)


def _packed() -> Iterator[Case]:
    heads = [(1, 1), (8, 2), (4, 4), (32, 8)]
    sizes = (32, 64, 80, 96, 112, 120, 128, 192, 256)
    for i, (lens, (hq, hkv), d) in enumerate(itertools.product(LENGTHS, heads, sizes)):
        dtype = FLOATS[i % 3]
        kv = ("auto", "auto", "fp8", "fp8_e5m2")[i // 2 % 4]
        x = 16 // cache_dtype(dtype, kv).itemsize
        if d % x or (max(lens) > 1000 and d * hq > 1024):
            continue

        def build(
            m: Maker,
            lens: list[int] = lens,
            hq: int = hq,
            hkv: int = hkv,
            bs: int = (8, 16, 32)[i % 3],
            d: int = d,
            x: int = x,
            dtype: torch.dtype = dtype,
            kv: str = kv,
            mode: int = i,
            v2: bool = False,
        ) -> Args:
            nb, s = sum(-(-n // bs) for n in lens) + 1, len(lens)
            table = block_tables(m, lens, nb, bs)
            k = torch.empty(nb, hkv, d // x, bs, x, dtype=cache_dtype(dtype, kv))
            v = torch.empty(nb, hkv, d, bs, dtype=cache_dtype(dtype, kv))
            for cache in (k, v):
                fill(m, cache, kv)
                spoil(m, cache, table, lens, bs, packed=True)
            args: Args = dict(out=m.poison(s, hq, d, dtype=dtype))
            if v2:
                parts = -(-max(lens) // 512) + 1
                args["exp_sums"] = m.poison(s, hq, parts)
                args["max_logits"] = m.poison(s, hq, parts)
                args["tmp_out"] = m.poison(s, hq, parts, d, dtype=dtype)
            args.update(
                query=m.rows(s, hq, d, dtype=dtype, how="padded"),
                key_cache=m.put(k),
                value_cache=m.put(v),
                num_kv_heads=hkv,
                scale=d**-0.5,
                block_tables=table,
                seq_lens=m.ints(lens, torch.int32),
                block_size=bs,
                max_seq_len=max(lens),
                alibi_slopes=m.normal(hq, std=0.1) if mode % 5 == 0 else None,
                kv_cache_dtype=kv,
                k_scale=m.floats(0.5),
                v_scale=m.floats(1.3),
            )
            if mode % 4 == 1:
                args.update(
                    tp_rank=1,
                    blocksparse_local_blocks=2,
                    blocksparse_vert_stride=3,
                    blocksparse_block_size=32,
                    blocksparse_head_sliding_step=(-1, 0, 2)[mode % 3],
                )
            return args

        def v2_build(m: Maker, build=build) -> Args:
            return build(m, v2=True)

        name = text(dtype, kv, sum(lens), hq, hkv, d, i)
        atol = 6e-5 if dtype == F32 else (1.0 if kv == "auto" else 1.5) * ONE_ULP[dtype]
        yield Case("paged_attention_v1", name, build, 32, 2.0, atol)
        yield Case("paged_attention_v2", name, v2_build, 33, 3.0, atol)


def _merge() -> Iterator[Case]:
    shapes = [(7, 4, 128), (3, 13, 46), (1, 1, 1), (0, 2, 64), (33, 16, 64)]
    for (n, h, d), dtype, mode in itertools.product(shapes, FLOATS, range(5)):

        def build(
            m: Maker,
            n: int = n,
            h: int = h,
            d: int = d,
            dtype: torch.dtype = dtype,
            mode: int = mode,
        ) -> Args:
            prefix = m.rows(n, h, d, dtype=dtype, how=("dense", "padded", "odd")[mode % 3])
            suffix = m.normal(n, d + 3, h + 1, dtype=dtype)[:, :d, :h].transpose(1, 2).contiguous()
            p = m.normal(h, n, std=3.0)
            s = m.normal(n, h + 1, std=3.0)[:, :h].t()
            if n > 2:
                inf = m.floats(math.inf)
                p[0, 0], s[0, 1], p[0, 2], s[0, 2] = inf[0], -inf[0], -inf[0], -inf[0]
            args: Args = dict(
                output=m.poison(n, h, d, dtype=dtype),
                prefix_output=prefix,
                prefix_lse=p,
                suffix_output=suffix,
                suffix_lse=s,
                output_lse=m.poison(h, n) if mode != 1 else None,
                prefill_tokens_with_context=n // 2 if mode == 2 else None,
            )
            if mode == 3:  # in place
                args["output"], args["output_lse"] = prefix, p
            if mode == 4:
                args["output"] = m.poison(n, h, d, dtype=U8)
                args["output_scale"] = m.floats(0.37)
            return args

        yield Case("merge_attn_states", text(dtype, n, h, d, mode), build, 34, 1.5, ONE_ULP[dtype])


def attention_cases() -> Iterator[Case]:
    yield from _paged()
    yield from _packed()
    yield from _merge()
