"""The error of the quantized all-reduce on activation-like data, as the table in
docs/quick_all_reduce.md. Needs no GPU: the kernels give the bits of the model used here.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

import torch

from communicators.backends.quick import codecs as quick
from communicators.base import dtype_name
from communicators.cli.bench import driver
from communicators.cli.bench.record import Row

TOKENS, HIDDEN = 64, 8192
KINDS = ("normal", "heavy tails", "outlier channels", "massive token")
OURS = ("rms", "others", "worst")


def partial_sums(
    kind: str, world_size: int, dtype: torch.dtype, generator: torch.Generator
) -> list[torch.Tensor]:
    """What the ranks of a tensor-parallel layer hold before its all-reduce, [tokens, hidden].

    normal: independent standard normal values. heavy tails: Student's t with 3 degrees of freedom.
    outlier channels: normal, and every 512th channel 100 times as large, in all tokens and ranks,
    as the residual stream of large decoders has them. massive token: as that, and one token 1000
    times as large in two channels (fp16: 20 times, so that the sum of 8 is finite).
    """
    made = []
    for _ in range(world_size):
        x = torch.randn(TOKENS, HIDDEN, generator=generator)
        if kind == "heavy tails":
            chi = (torch.randn(3, TOKENS, HIDDEN, generator=generator) ** 2).mean(0)
            x = x / chi.sqrt()
        if kind in ("outlier channels", "massive token"):
            x[:, ::512] *= 100
        if kind == "massive token":
            x[0, [0, 4096]] *= 1000 if dtype is torch.bfloat16 else 20
        made.append(x.to(dtype))
    return made


def errors(kind: str, world_size: int, codec: str, dtype: torch.dtype) -> dict[str, float]:
    """In percent: rms error over rms; the same of the channels without outliers; and the largest
    error over the largest exact value of its block of 32."""
    inputs = partial_sums(kind, world_size, dtype, torch.Generator().manual_seed(1))
    exact = torch.stack(inputs).double().sum(0)
    error = quick.all_reduce(inputs, codec).double() - exact
    plain = torch.ones(HIDDEN, dtype=torch.bool)
    plain[::512] = False
    share = rms(error) / rms(exact)
    rest = rms(error[:, plain]) / rms(exact[:, plain])
    largest = exact.view(-1, quick.BLOCK).abs().amax(1, keepdim=True)
    worst = float((error.view(-1, quick.BLOCK).abs() / largest).max())
    return {"rms": 100 * share, "others": 100 * rest, "worst": 100 * worst}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    driver.add_ranks(parser, [2, 8])


def rows(options: argparse.Namespace, facts: dict[str, Any]) -> Iterator[Row]:
    for kind in KINDS:
        for world_size in options.ranks:
            for codec in quick.CODECS:
                for dtype in (torch.bfloat16, torch.float16):
                    found = errors(kind, world_size, codec, dtype)
                    key = {"data": kind, "ranks": world_size, "codec": codec}
                    key["dtype"] = dtype_name(dtype)
                    snr = f"{-20 * math.log10(found['rms'] / 100):.1f}"
                    yield Row(key, found, "%", notes={"SNR, dB": snr})


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())
