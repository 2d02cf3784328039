"""Decode attention over so many sequences that nothing is split: two KV heads to a block, where
heads, layout and alignment allow it."""

from __future__ import annotations

import pytest
import torch

import kvcache_ops
from tests.unit.ops.cases_attention import paged_args
from tests.unit.ops.ops_checks import check
from tests.unit.ops.ops_maker import BF16, ONE_ULP, Args, Case, Maker


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
        return paged_args(m, lens, hq, hkv, bs, d, dtype, "auto", layout, alibi)

    case = Case("paged_attention", f"{layout} {hq} {hkv} {d}", build, 41, 2.0, ONE_ULP[dtype])
    check(case, "cuda")
    results = []
    for _ in range(2):
        args = case.args("cuda")
        kvcache_ops.paged_attention(**args)
        results.append((args["out"], args["out_lse"]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
