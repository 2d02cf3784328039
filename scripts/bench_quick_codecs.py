"""The error of the quantized all-reduce on activation-like data, as the table in
docs/quick_all_reduce.md. Needs no GPU: the kernels give the bits of the model used here.

    python scripts/bench_quick_codecs.py
"""

from __future__ import annotations

import math

import torch

from communicators.backends import quick_codecs as quick

TOKENS, HIDDEN = 64, 8192


def partial_sums(kind: str, world_size: int, generator: torch.Generator) -> list[torch.Tensor]:
    """What the ranks of a tensor-parallel layer hold before its all-reduce, bf16 [tokens, hidden].

    normal: independent standard normal values. heavy tails: Student's t with 3 degrees of freedom.
    outlier channels: normal, and every 512th channel 100 times as large, in all tokens and ranks,
    as the residual stream of large decoders has them. massive token: as that, and one token 1000
    times as large in two channels.
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
            x[0, [0, 4096]] *= 1000
        made.append(x.bfloat16())
    return made


def main() -> None:
    print("| data | ranks | codec | SNR, dB | rms error / rms | rms error / rms without outliers |")
    print("|---|---|---|---|---|---|")
    for kind in ("normal", "heavy tails", "outlier channels", "massive token"):
        for world_size in (2, 8):
            generator = torch.Generator().manual_seed(1)
            inputs = partial_sums(kind, world_size, generator)
            exact = torch.stack(inputs).double().sum(0)
            plain = torch.ones(HIDDEN, dtype=torch.bool)
            plain[::512] = False
            for codec in quick.CODECS:
                error = quick.all_reduce(inputs, codec).double() - exact
                share = rms(error) / rms(exact)
                rest = rms(error[:, plain]) / rms(exact[:, plain])
                decibel = -20 * math.log10(share)
                cells = (f"{decibel:.1f}", f"{share:.2%}", f"{rest:.2%}")
                print("|", " | ".join((kind, str(world_size), codec, *cells)), "|")


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


if __name__ == "__main__":
    main()
