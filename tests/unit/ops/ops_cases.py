"""One generator of cases for every op, for any device.

A case builds fresh arguments from its seed: call it twice and the two sets are equal and separate,
so that one goes through the kernel and the other through the reference, and the whole memory behind
every tensor (what lies around a view too) can be compared.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
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


def storage(t: Tensor) -> Tensor:
    """All memory behind a tensor, in its dtype."""
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())


# --- norm, RoPE, activation -----------------------------------------------------------------------


def _norm_cases() -> Iterator[Case]:
    shapes = [(1, 64), (3, 1), (5, 33), (7, 4096), (2, 3, 130), (2, 3, 2, 40), (0, 64), (4, 8192)]
    for dtype in FLOATS:
        for shape in shapes:
            for weight in ("row", "rows", "none"):
                for how in ("dense", "padded", "odd"):
                    if how != "dense" and shape[-1] == 8192:
                        continue

                    def build(
                        m: Maker,
                        shape: tuple[int, ...] = shape,
                        dtype: torch.dtype = dtype,
                        weight: str = weight,
                        how: str = how,
                        fused: bool = False,
                    ) -> Args:
                        x = m.rows(shape[0], *shape[1:], dtype=dtype, how=how)
                        if how == "padded" and len(shape) > 2:  # permuted leading dimensions
                            x = m.rows(shape[1], shape[0], *shape[2:], dtype=dtype, how=how)
                            x = x.transpose(0, 1)
                        w = None
                        if weight == "row":
                            w = m.normal(shape[-1], dtype=dtype)
                        elif weight == "rows":
                            w = m.normal(shape[0], shape[-1], dtype=dtype)
                        if fused:
                            residual = m.rows(shape[0], *shape[1:], dtype=dtype, how=how)
                            return dict(input=x, residual=residual, weight=w, epsilon=1e-6)
                        out = m.poison(*shape, dtype=dtype)
                        return dict(out=out, input=x, weight=w, epsilon=1e-5)

                    def fused_build(m: Maker, build: Callable[..., Args] = build) -> Args:
                        return build(m, fused=True)

                    name = f"{dtype}-{shape}-{weight}-{how}".replace("torch.", "")
                    yield Case("rms_norm", name, build, 1, 1.0, 1e-6)
                    yield Case("fused_add_rms_norm", name, fused_build, 2, 1.0, 1e-6)

    def strided(m: Maker) -> Args:
        x = m.normal(64, 6).t()
        return dict(out=m.poison(6, 64), input=x, weight=m.normal(64), epsilon=1e-5)

    yield Case("rms_norm", "last-dimension-strided", strided, 3, 1.0, 1e-6)


def _rotary_cases() -> Iterator[Case]:
    layouts = ["flat", "heads", "sliced", "batch", "no-key", "strided-heads"]
    geometries = [(8, 2, 128, 128, 0), (4, 4, 64, 32, 0), (6, 1, 80, 40, 24), (3, 3, 46, 46, 0)]
    for dtype in FLOATS:
        for layout in layouts:
            for hq, hk, d, rot, offset in geometries:
                for neox in (True, False):

                    def build(
                        m: Maker,
                        dtype: torch.dtype = dtype,
                        layout: str = layout,
                        hq: int = hq,
                        hk: int = hk,
                        d: int = d,
                        rot: int = rot,
                        offset: int = offset,
                        neox: bool = neox,
                    ) -> Args:
                        n, limit = 6, 50
                        positions = m.ints([m.random.randrange(limit) for _ in range(n)])
                        if layout == "sliced":  # query and key out of one fused projection
                            qkv = m.normal(n, (hq + 2 * hk) * d, dtype=dtype)
                            query, key = qkv[:, : hq * d], qkv[:, hq * d : (hq + hk) * d]
                        elif layout == "strided-heads":
                            query = m.normal(n, hq, d + 7, dtype=dtype)[:, :, 3 : d + 3]
                            key = m.normal(hk, n, d, dtype=dtype).transpose(0, 1)
                        else:
                            query = m.normal(n, hq * d, dtype=dtype)
                            key = m.normal(n, hk * d, dtype=dtype)
                            if layout == "heads":
                                query, key = query.view(n, hq, d), key.view(n, hk, d)
                            if layout == "batch":
                                positions = positions.view(2, 3)
                                query, key = query.view(2, 3, -1), key.view(2, 3, -1)
                        table = F32 if offset else dtype
                        return dict(
                            positions=positions,
                            query=query,
                            key=None if layout == "no-key" else key,
                            head_size=d,
                            cos_sin_cache=m.normal(limit, rot, dtype=table, std=0.7),
                            is_neox=neox,
                            rope_dim_offset=offset,
                            inverse=layout == "heads",
                        )

                    name = f"{dtype}-{layout}-{hq}-{hk}-{d}-{rot}-{neox}".replace("torch.", "")
                    # x c - y s cancels: the error is relative to the operands, about 1 each.
                    yield Case("rotary_embedding", name, build, 4, 1.0, 4 * ONE_ULP[dtype] / 8)

    def none(m: Maker) -> Args:
        return dict(
            positions=m.ints([]),
            query=m.normal(0, 64),
            key=None,
            head_size=32,
            cos_sin_cache=m.normal(4, 32),
            is_neox=True,
            rope_dim_offset=0,
            inverse=False,
        )

    yield Case("rotary_embedding", "zero-tokens", none, 5)


def _activation_cases() -> Iterator[Case]:
    extra: dict[str, Args] = {
        "silu_and_mul": {},
        "mul_and_silu": {},
        "gelu_and_mul": {},
        "gelu_tanh_and_mul": {},
        "fatrelu_and_mul": {"threshold": 0.3},
        "swigluoai_and_mul": {"alpha": 1.702, "limit": 1.5},
    }
    for op, scalars in extra.items():
        for dtype in FLOATS:
            for shape in [(1, 8), (7, 13), (3, 5000), (2, 3, 128), (0, 16), (4, 0), (9,)]:
                for odd in (False, True):

                    def build(
                        m: Maker,
                        op: str = op,
                        scalars: Args = scalars,
                        dtype: torch.dtype = dtype,
                        shape: tuple[int, ...] = shape,
                        odd: bool = odd,
                    ) -> Args:
                        wide = (*shape[:-1], 2 * shape[-1])
                        n, w = math.prod(shape), math.prod(wide)
                        x = m.normal(w + 5, dtype=dtype, std=3.0)[odd : w + odd].view(wide)
                        out = m.poison(n + 5, dtype=dtype)[3 * odd : n + 3 * odd].view(shape)
                        if n > 12:
                            first, last = x.flatten()[:4], x.flatten()[-3:]
                            first.copy_(m.floats(0.0, -0.0, math.inf, 30.0).to(dtype))
                            last.copy_(m.floats(math.nan, -90.0, 2.0).to(dtype))
                        result = "result" if op == "silu_and_mul" else "out"
                        return {result: out, "input": x, **scalars}

                    name = f"{dtype}-{shape}-{'odd' if odd else 'even'}".replace("torch.", "")
                    # The activation is rounded, then the product: two roundings may flip.
                    yield Case(op, name, build, 6, 2.0, 1e-6 if dtype == F32 else 1e-7)


def all_cases() -> list[Case]:
    return [*_norm_cases(), *_rotary_cases(), *_activation_cases()]
