"""Cases of the norm, RoPE and activation ops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from tests.unit.ops.ops_maker import F32, FLOATS, ONE_ULP, Args, Case, Maker


def _norm_cases() -> Iterator[Case]:
    shapes = [(1, 64), (3, 1), (5, 33), (7, 4096), (2, 3, 130), (2, 3, 2, 40), (0, 64), (4, 8192)]
    # Numbers of vectors that blocks or warps cannot share out evenly.
    uneven = [(2, 1032), (3, 5000)]
    for dtype in FLOATS:
        for shape in [*shapes, *uneven]:
            for weight in ("row", "rows", "none"):
                for how in ("dense", "padded", "odd"):
                    if how != "dense" and (shape[-1] == 8192 or shape in uneven):
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

    for key_heads in (0, 2):

        def no_query_heads(m: Maker, key_heads: int = key_heads) -> Args:
            return dict(
                positions=m.ints([3, 0, 2]),
                query=m.normal(3, 0),
                key=m.normal(3, key_heads * 32) if key_heads > 0 else None,
                head_size=32,
                cos_sin_cache=m.normal(4, 32),
                is_neox=True,
                rope_dim_offset=0,
                inverse=False,
            )

        yield Case("rotary_embedding", f"0-query-heads-{key_heads}", no_query_heads, 6, 1.0, 1e-6)


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


def elementwise_cases() -> Iterator[Case]:
    yield from _norm_cases()
    yield from _rotary_cases()
    yield from _activation_cases()
