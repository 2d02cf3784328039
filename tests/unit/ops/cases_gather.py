"""Cases of the gathers, with garbage in their tables, and of block moves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from tests.unit.ops.cases_cache import FORMATS, cache_dtype, text
from tests.unit.ops.ops_maker import BF16, F32, FLOATS, U8, Args, Case, Maker


def tables(m: Maker, lens: list[int], starts: list[int], nb: int, bs: int, extra: int) -> Args:
    """block_table with garbage past each sequence (and one block outside the cache), and cu."""
    width = max(-(-(n + s) // bs) for n, s in zip(lens, starts, strict=True)) + extra
    table = [[m.random.randrange(-(1 << 30), 1 << 30) for _ in range(width)] for _ in lens]
    for row, n, s in zip(table, lens, starts, strict=True):
        for i in range(-(-(n + s) // bs)):
            row[i] = m.random.randrange(nb)
    if width > 2:
        table[0][1] = nb  # outside: its rows stay
    cu = [0, *itertools.accumulate(lens)]
    return dict(
        block_table=m.ints(table, torch.int32),
        cu_seq_lens=m.ints(cu, torch.int32),
        seq_starts=m.ints(starts, torch.int32) if any(starts) else None,
    )


LENGTHS = [([5], [0]), ([0, 17, 3, 0, 40], [0] * 5), ([9, 1, 12], [3, 0, 21]), ([0, 0], [0, 0])]


def _gather() -> Iterator[Case]:
    for (lens, starts), (bs, e) in itertools.product(LENGTHS, [(16, 576), (4, 33), (1, 320)]):
        for dtype, kv in itertools.product(FLOATS, FORMATS):

            def build(
                m: Maker,
                lens: list[int] = lens,
                starts: list[int] = starts,
                bs: int = bs,
                e: int = e,
                dtype: torch.dtype = dtype,
                kv: str = kv,
            ) -> Args:
                nb, total = 7, sum(lens)
                maps = tables(m, lens, starts, nb, bs, 1)
                src = m.poison(nb, bs + 1, e + 2, dtype=cache_dtype(dtype, kv))[:, :bs, 1 : e + 1]
                seqs = [b for b, n in enumerate(lens) for _ in range(n)]
                return dict(
                    src_cache=src,
                    dst=m.poison(total + 3, e + 5, dtype=dtype)[:, :e],
                    **maps,
                    token_to_seq=m.ints(seqs, torch.int32),
                    num_tokens=total,
                    kv_cache_dtype=kv,
                    scale=m.floats(0.7),
                )

            # A NaN keeps its bits in a copy; dequantized, only that it is one.
            ulps = 0.0 if kv == "auto" else 0.001
            name = text(dtype, kv, sum(lens), bs, e, max(starts))
            yield Case("gather_and_maybe_dequant_cache", name, build, 19, ulps)

        for dtype in (F32, BF16, U8):

            def raw(
                m: Maker,
                lens: list[int] = lens,
                starts: list[int] = starts,
                bs: int = bs,
                e: int = e,
                dtype: torch.dtype = dtype,
            ) -> Args:
                nb = 6
                maps = tables(m, lens, starts, nb, bs, 0)
                src = m.poison(nb, bs, e + 3, dtype=dtype)[:, :, 2 : e + 2]
                dst = m.poison(sum(lens) + 4, e + 1, dtype=dtype)[:, 1:]
                if e == 576:
                    src = m.poison(nb, bs, 4, 144, dtype=dtype)
                    dst = m.poison(sum(lens), 4, 144, dtype=dtype)
                return dict(src_cache=src, dst=dst, **maps, batch_size=len(lens))

            name = text(dtype, sum(lens), bs, e, max(starts))
            yield Case("cp_gather_cache", name, raw, 20)


def ds_mla_cache(m: Maker, nb: int, bs: int) -> Tensor:
    cache = m.poison(nb, bs, 656, dtype=U8)
    scales = m.put(torch.rand(nb, bs, 4, generator=m.generator) + 0.5)
    cache[:, :, 512:528] = scales.view(U8)
    return cache


def _upconvert() -> Iterator[Case]:
    for (lens, starts), bs, host in itertools.product(LENGTHS, (64, 3), (False, True)):

        def build(
            m: Maker,
            lens: list[int] = lens,
            starts: list[int] = starts,
            bs: int = bs,
            host: bool = host,
        ) -> Args:
            nb = 5
            maps = tables(m, lens, starts, nb, bs, 1)
            cu = maps.pop("cu_seq_lens")
            args = dict(
                src_cache=ds_mla_cache(m, nb, bs),
                dst=m.poison(sum(lens), 576, dtype=BF16),
                **maps,
                workspace_starts=cu[:-1].clone(),
                batch_size=len(lens),
            )
            if host:
                rows = 4
                cache = ds_mla_cache(Maker(99, torch.device("cpu")), 1, rows)[0].contiguous()
                if m.device.type == "cuda":
                    cache = cache.pin_memory()
                ids = [m.random.randrange(-2, nb * bs) for _ in range(nb * bs)]
                args["device_row_ids"] = m.ints(ids, torch.int32)
                hosts = [m.random.randrange(rows + 1) for _ in range(nb * bs)]
                args["host_row_ids"] = m.ints(hosts, torch.int32)
                args["host_cache"] = cache
            return args

        name = text(sum(lens), bs, max(starts), "host" if host else "device")
        yield Case("cp_gather_and_upconvert_fp8_kv_cache", name, build, 21, 0.001)


def _indexer() -> Iterator[Case]:
    for (lens, starts), (bs, d, qb) in itertools.product(
        LENGTHS, [(64, 128, 128), (4, 64, 32), (1, 48, 16)]
    ):
        if any(starts):
            continue

        def gather(
            m: Maker, lens: list[int] = lens, bs: int = bs, d: int = d, qb: int = qb
        ) -> Args:
            nb, width = 6, 4 * d // qb
            maps = tables(m, lens, [0] * len(lens), nb, bs, 0)
            maps.pop("seq_starts")
            return dict(
                kv_cache=m.poison(nb, bs + 2, d + width, dtype=U8)[:, :bs],
                dst_k=m.poison(sum(lens) + 2, d, dtype=U8),
                dst_scale=m.poison(sum(lens) + 2, width, dtype=U8),
                **maps,
            )

        yield Case("cp_gather_indexer_k_quant_cache", text(sum(lens), bs, d, qb), gather, 23)


def _swap() -> Iterator[Case]:
    for n, size in itertools.product((0, 1, 7), (1, 24, 4096)):

        def build(m: Maker, n: int = n, size: int = size) -> Args:
            blocks = 9
            pairs = list(
                zip(
                    m.random.sample(range(blocks), n),
                    m.random.sample(range(blocks), n),
                    strict=True,
                )
            )
            mapping = torch.tensor(pairs, dtype=torch.int64).view(n, 2).t().contiguous().t()
            return dict(
                src=m.poison(blocks, size, dtype=U8),
                dst=m.poison(blocks, size, dtype=U8),
                block_size_in_bytes=size,
                block_mapping=mapping,
            )

        yield Case("swap_blocks", text(n, size), build, 24)


def gather_cases() -> Iterator[Case]:
    for family in (_gather, _upconvert, _indexer, _swap):
        yield from family()
