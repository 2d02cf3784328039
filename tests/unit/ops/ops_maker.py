"""One generator of cases for every op, for any device.

A case builds fresh arguments from its seed: call it twice and the two sets are equal and separate,
so that one goes through the kernel and the other through the reference, and the whole memory behind
every tensor (what lies around a view too) can be compared.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

F32, F16, BF16, U8 = torch.float32, torch.float16, torch.bfloat16, torch.uint8
FLOATS = (F32, F16, BF16)
Args = dict[str, Any]

# A rounding that falls the other way is one unit in the last place: 2^-7 of a bf16 at most.
ONE_ULP = {F32: 1e-5, F16: 2.0**-10, BF16: 2.0**-7}


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    build: Callable[[Maker], Args]
    seed: int = 0
    # Relative tolerance in units of ONE_ULP; 0 compares the bytes.
    ulps: float = 0.0
    atol: float = 0.0

    def args(self, device: torch.device | str = "cpu") -> Args:
        return self.build(Maker(self.seed, torch.device(device)))

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


class Maker:
    """Tensors from one seed. Drawn on the CPU, so that every device gets the same numbers."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def put(self, t: Tensor) -> Tensor:
        """To the device, keeping strides, offset and what lies around a view."""
        if self.device.type == "cpu":
            return t
        whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).to(self.device)
        return whole.as_strided(t.shape, t.stride(), t.storage_offset())

    def normal(self, *shape: int, dtype: torch.dtype = F32, std: float = 1.0) -> Tensor:
        return self.put((torch.randn(*shape, generator=self.generator) * std).to(dtype))

    def poison(self, *shape: int, dtype: torch.dtype = F32) -> Tensor:
        """Random bits: NaN, inf and every other pattern among them."""
        count = math.prod(shape) * dtype.itemsize
        data = torch.randint(0, 256, (count,), generator=self.generator, dtype=U8)
        return self.put(data.view(dtype).view(shape))

    def ints(self, values: Any, dtype: torch.dtype = torch.int64) -> Tensor:
        return self.put(torch.tensor(values, dtype=dtype))

    def floats(self, *values: float) -> Tensor:
        return self.put(torch.tensor(values, dtype=F32))

    def slots(self, n: int, num_blocks: int, block_size: int, skip: float = 0.2) -> Tensor:
        """n different slots in a random order, some replaced by a negative one."""
        chosen = self.random.sample(range(num_blocks * block_size), n)
        return self.ints([-1 if self.random.random() < skip else s for s in chosen])

    def rows(self, n: int, *shape: int, dtype: torch.dtype, how: str = "dense") -> Tensor:
        """[n, *shape] normal values: dense, with padded rows, or at an odd address."""
        width = math.prod(shape)
        if how == "dense":
            return self.normal(n, *shape, dtype=dtype)
        pad = 3 if how == "odd" else 16
        whole = self.normal(n * (width + pad) + pad, dtype=dtype)
        flat = whole[1 if how == "odd" else 0 :]
        return flat[: n * (width + pad)].view(n, width + pad)[:, :width].unflatten(1, shape)


def pointing(m: Maker, memory: list[Tensor]) -> Tensor:
    """The addresses of tensors, int64; they are kept alive, and compared, through it."""
    addresses = m.ints([t.data_ptr() for t in memory])
    addresses.behind = memory  # type: ignore[attr-defined]
    return addresses


def behind(x: Tensor) -> list[Tensor]:
    """The tensors that a tensor of addresses points to; empty for any other."""
    return getattr(x, "behind", [])


def storage(t: Tensor) -> Tensor:
    """All memory behind a tensor, in its dtype."""
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())
