"""Decode attention over so many sequences that nothing is split: two KV heads to a block, where
heads, layout and alignment allow it."""

from __future__ import annotations

import pytest
import torch
from cases_attention import block_tables, fill, spoil
from cases_cache import flash_cache
from ops_checks import check
from ops_maker import BF16, ONE_ULP, Args, Case, Maker

import kvcache_ops


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("heads", [(32, 4), (12, 4), (6, 6), (35, 5), (64, 4)])
@pytest.mark.parametrize(
    ("layout", "d", "bs", "alibi"),
    [
        ("NHD", 128, 16, False),
        ("NHD", 128, 5, True),
        ("HND", 120, 16, False),
        ("interleaved", 72, 32, True),
        ("padded", 128, 16, False),
        ("NHD", 64, 16, False),
    ],
)
def test_paged_attention(
    dtype: torch.dtype, heads: tuple[int, int], layout: str, d: int, bs: int, alibi: bool
) -> None:
    hq, hkv = heads

    def build(m: Maker) -> Args:
        lens = [m.random.choice([0, 1, 15, 16, 64, m.random.randrange(100)]) for _ in range(170)]
        nb = sum(-(-n // bs) for n in lens) + 1
        table = block_tables(m, lens, nb, bs)
        caches = []
        for seed in (5, 6):
            cache = flash_cache(Maker(seed, torch.device("cpu")), layout, nb, bs, hkv, d, dtype)
            fill(m, cache, "auto")
            spoil(m, cache, table, lens, bs, packed=False)
            caches.append(m.put(cache))
        return dict(
            out=m.poison(len(lens), hq, d, dtype=dtype),
            query=m.normal(len(lens), hq, d + 8, dtype=dtype)[:, :, :d],
            key_cache=caches[0],
            value_cache=caches[1],
            block_tables=table,
            seq_lens=m.ints(lens, torch.int32),
            scale=d**-0.5,
            out_lse=m.poison(hq, len(lens)),
            alibi_slopes=m.normal(hq, std=0.1) if alibi else None,
        )

    case = Case("paged_attention", f"{layout} {hq} {hkv} {d}", build, 41, 2.0, ONE_ULP[dtype])
    check(case, "cuda")
    results = []
    for _ in range(2):
        args = case.args("cuda")
        kvcache_ops.paged_attention(**args)
        results.append((args["out"], args["out_lse"]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
