"""What quantized all-reduces do to a trained model: the one that ships, on text held out from it.

The outputs of its attention and MLP layers are split over simulated ranks, as tensor parallelism
splits them, and added by the model of the kernels in quick_codecs.py. Needs no GPU.
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from communicators.backends.quick import codecs as quick
from communicators.base import dtype_name
from communicators.cli.bench import driver
from communicators.cli.bench.record import Row
from scripts.tp_llama.options import SHIPPED
from scripts.tp_llama.train import VALIDATION_EVERY_NTH_FILE, Corpus, source_files
from scripts.tp_llama.train_model import DenseLlama, Shape

OURS = ("rms of a sum, %", "loss, nats per byte")
ROWS, LENGTH = 24, 256


class RowParallel(nn.Module):
    """A linear layer whose input is split over `world_size` ranks; the parts are all-reduced.

    `noise` collects (squared error, squared exact sum) of its all-reduces.
    """

    def __init__(self, weight: Tensor, world_size: int, codec: str, noise: list[Tensor]) -> None:
        super().__init__()
        self.parts = weight.chunk(world_size, dim=1)
        self.codec, self.noise = codec, noise

    def forward(self, x: Tensor) -> Tensor:
        sizes = [part.size(1) for part in self.parts]
        inputs = [
            F.linear(own, part) for own, part in zip(x.split(sizes, -1), self.parts, strict=True)
        ]
        out = quick.all_reduce(inputs, self.codec)
        exact = torch.stack(inputs).double().sum(0)
        self.noise.append(torch.stack([(out - exact).square().sum(), exact.square().sum()]))
        return out


def split_model(world_size: int, codec: str, dtype: torch.dtype, noise: list[Tensor]) -> DenseLlama:
    model = DenseLlama(Shape())
    model.load_state_dict(
        load_file(SHIPPED / "model.safetensors"), strict=False
    )  # the head is tied
    model = model.to(dtype).eval()
    for layer in model.model.layers:
        for holder, name in ((layer.self_attn, "o_proj"), (layer.mlp, "down_proj")):
            weight = getattr(holder, name).weight.detach()
            setattr(holder, name, RowParallel(weight, world_size, codec, noise))
    return model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    driver.add_ranks(parser, [2, 4, 8])


@torch.no_grad()
def rows(options: argparse.Namespace, facts: dict[str, Any]) -> Iterator[Row]:
    files = source_files(Path(sysconfig.get_path("stdlib")))[::VALIDATION_EVERY_NTH_FILE]
    batch = Corpus(files).batch(ROWS, LENGTH, torch.Generator().manual_seed(1))
    facts["text"] = f"{ROWS} x {LENGTH} bytes of {len(files)} files of the standard library"
    for dtype in (torch.bfloat16, torch.float16):
        for world_size in options.ranks:
            greedy = None
            for codec in quick.CODECS:
                noise: list[Tensor] = []
                logits = split_model(world_size, codec, dtype, noise)(batch[:, :-1]).float()
                loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
                choice = logits.argmax(-1)
                greedy = choice if greedy is None else greedy
                error, signal = torch.stack(noise).sum(0)
                rms = float(100 * (error / signal).sqrt())
                key = {"dtype": dtype_name(dtype), "ranks": world_size, "codec": codec}
                same = f"{(choice == greedy).float().mean():.2%}"
                values = dict(zip(OURS, (rms, float(loss)), strict=True))
                yield Row(key, values, "", notes={"same greedy byte": same})
