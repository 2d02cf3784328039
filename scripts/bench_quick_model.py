"""What quantized all-reduces do to a trained model: the one that ships, on text held out from it.

The outputs of its attention and MLP layers are split over simulated ranks, as tensor parallelism
splits them, and added by the model of the kernels in quick_codecs.py. Needs no GPU:

    python -m scripts.bench_quick_model
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from communicators.backends.quick import codecs as quick
from communicators.base import dtype_name

from .tp_llama.train import VALIDATION_EVERY_NTH_FILE, Corpus, source_files
from .tp_llama.train_model import DenseLlama, Shape

CHECKPOINT = Path(__file__).parent / "tp_llama/checkpoint/model.safetensors"
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
    model.load_state_dict(load_file(CHECKPOINT), strict=False)  # the head is tied
    model = model.to(dtype).eval()
    for layer in model.model.layers:
        for holder, name in ((layer.self_attn, "o_proj"), (layer.mlp, "down_proj")):
            weight = getattr(holder, name).weight.detach()
            setattr(holder, name, RowParallel(weight, world_size, codec, noise))
    return model


@torch.no_grad()
def main() -> None:
    files = source_files(Path(sysconfig.get_path("stdlib")))[::VALIDATION_EVERY_NTH_FILE]
    batch = Corpus(files).batch(ROWS, LENGTH, torch.Generator().manual_seed(1))
    print(f"{ROWS} x {LENGTH} bytes of {len(files)} files of the standard library")
    print("| dtype | ranks | codec | rms of a sum | loss, nats per byte | same greedy byte |")
    print("|---|---|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float16):
        for world_size in (2, 4, 8):
            greedy = None
            for codec in quick.CODECS:
                noise: list[Tensor] = []
                logits = split_model(world_size, codec, dtype, noise)(batch[:, :-1]).float()
                loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
                choice = logits.argmax(-1)
                greedy = choice if greedy is None else greedy
                error, signal = torch.stack(noise).sum(0)
                cells = (
                    dtype_name(dtype), str(world_size), codec, f"{(error / signal).sqrt():.2%}",
                    f"{loss:.4f}", f"{(choice == greedy).float().mean():.2%}",
                )  # fmt: skip
                print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
