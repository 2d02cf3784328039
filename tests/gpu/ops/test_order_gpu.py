"""Kernels that start while their predecessor ends still see what it wrote, in a stream and in a
graph, and leave it what it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import kvcache_ops

BF16 = torch.bfloat16


class Chain:
    """Ops of very different lengths, each on the results of the one before it."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        put: Any = {"device": "cuda", "dtype": BF16}
        self.x = torch.randn(4096, 8192, **put)
        self.residual = torch.randn(4096, 8192, **put)
        self.weight = torch.randn(8192, **put)
        self.normed = torch.empty_like(self.x)
        self.gated = torch.empty(4096, 4096, **put)
        self.codes = torch.empty(4096, 4096, device="cuda", dtype=torch.uint8)
        self.small = torch.empty(1, 4096, **put)
        self.cache = torch.zeros(256, 16, 32, 128, **put)
        self.slots = torch.randperm(4096, device="cuda")
        self.one = torch.ones(1, device="cuda")
        self.attended = torch.empty(1, 32, 128, **put)
        self.table = torch.arange(256, device="cuda", dtype=torch.int32).view(1, -1)
        self.length = torch.tensor([4096], device="cuda", dtype=torch.int32)
        self.start = [t.clone() for t in self.state()]

    def state(self) -> list[torch.Tensor]:
        return [self.x, self.residual, self.cache, self.attended, self.codes, self.small]

    def reset(self) -> None:
        for t, first in zip(self.state(), self.start, strict=True):
            t.copy_(first)

    def steps(self) -> list[Callable[[], None]]:
        return [
            lambda: kvcache_ops.fused_add_rms_norm(self.x, self.residual, self.weight, 1e-5),
            lambda: kvcache_ops.rms_norm(self.normed, self.x, self.weight, 1e-5),
            lambda: kvcache_ops.silu_and_mul(self.gated, self.normed),
            lambda: kvcache_ops.convert_fp8(self.codes, self.gated, 0.7),
            lambda: kvcache_ops.rms_norm(self.small, self.gated[:1], self.weight[:4096], 1e-5),
            lambda: kvcache_ops.reshape_and_cache_flash(
                self.gated.view(4096, 32, 128),
                self.gated.view(4096, 32, 128),
                self.cache,
                self.cache,
                self.slots,
                "auto",
                self.one,
                self.one,
            ),
            lambda: kvcache_ops.paged_attention(
                self.attended,
                self.small.view(1, 32, 128),
                self.cache,
                self.cache,
                self.table,
                self.length,
                128**-0.5,
            ),
            lambda: kvcache_ops.convert_fp8(self.gated, self.codes, 0.7),
        ]


def run(chain: Chain, repeats: int, apart: bool) -> None:
    for _ in range(repeats):
        for step in chain.steps():
            step()
            if apart:
                torch.cuda.synchronize()


@pytest.mark.parametrize("captured", [False, True])
def test_chain(captured: bool) -> None:
    chain = Chain()
    run(chain, 3, apart=True)
    expected = [t.clone() for t in chain.state()]
    chain.reset()
    graph = torch.cuda.CUDAGraph()
    if captured:
        with torch.cuda.graph(graph):
            run(chain, 3, apart=False)
    for _ in range(5):
        chain.reset()
        graph.replay() if captured else run(chain, 3, apart=False)
        for got, want in zip(chain.state(), expected, strict=True):
            assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
