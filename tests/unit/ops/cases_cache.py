"""Cases of the cache writes, in every layout, and of conversions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tests.unit.ops.ops_maker import BF16, F16, FLOATS, U8, Args, Case, Maker

FORMATS = ("auto", "fp8", "fp8_e5m2")


def cache_dtype(dtype: torch.dtype, kv: str) -> torch.dtype:
    return U8 if kv.startswith("fp8") else dtype


def text(*parts: object) -> str:
    return "-".join(str(p) for p in parts).replace("torch.", "")


def flash_cache(m: Maker, layout: str, nb: int, bs: int, h: int, d: int, dt: torch.dtype) -> Tensor:
    """A view [NB, BS, H, D] of poisoned memory."""
    if layout == "HND":
        return m.poison(nb, h, bs, d, dtype=dt).permute(0, 2, 1, 3)
    if layout == "interleaved":
        return m.poison(nb, 2, bs, h, d, dtype=dt)[:, 1]
    if layout == "padded":
        return m.poison(nb, bs + 1, h, d + 3, dtype=dt)[:, :bs, :, 1 : d + 1]
    return m.poison(nb, bs, h, d, dtype=dt)


def special(m: Maker, x: Tensor) -> Tensor:
    """Some values that quantization must get right: NaN, inf, zeros, huge and tiny ones."""
    if x.numel() > 8:
        values = m.floats(math.nan, math.inf, -math.inf, 0.0, -0.0, 6e4, 1e-7, -449.0)
        x[(0,) * (x.dim() - 1)][:8] = values[: x.shape[-1]].to(x.dtype)
    return x


def _flash() -> Iterator[Case]:
    shapes = [(5, 4, 16, 2, 64), (7, 3, 8, 13, 46), (3, 9, 1, 1, 33), (40, 6, 32, 8, 128)]
    shapes += [(4, 2, 64, 128, 32), (2, 3, 16, 5, 256), (0, 2, 16, 2, 64)]
    for (n, nb, bs, h, d), dtype, kv in itertools.product(shapes, FLOATS, FORMATS):
        for layout in ("NHD", "HND", "interleaved", "padded"):
            for how, per_head in (("dense", False), ("odd", True)):

                def build(
                    m: Maker,
                    n: int = n,
                    nb: int = nb,
                    bs: int = bs,
                    h: int = h,
                    d: int = d,
                    dtype: torch.dtype = dtype,
                    kv: str = kv,
                    layout: str = layout,
                    how: str = how,
                    per_head: bool = per_head,
                ) -> Args:
                    scales = h if per_head else 1
                    key = special(m, m.rows(n + 2, h, d, dtype=dtype, how=how))
                    return dict(
                        key=key,
                        value=m.rows(n + 2, h, d, dtype=dtype, how="padded"),
                        key_cache=flash_cache(m, layout, nb, bs, h, d, cache_dtype(dtype, kv)),
                        value_cache=flash_cache(m, layout, nb, bs, h, d, cache_dtype(dtype, kv)),
                        slot_mapping=m.slots(min(n, nb * bs), nb, bs),
                        kv_cache_dtype=kv,
                        k_scale=m.floats(*(0.3 + 0.1 * i for i in range(scales))),
                        v_scale=m.floats(*(1.7 - 0.01 * i for i in range(scales))),
                    )

                name = text(dtype, kv, n, bs, h, d, layout, how)
                yield Case("reshape_and_cache_flash", name, build, 11)

    def past_the_cache(m: Maker) -> Args:
        return dict(
            key=m.normal(4, 2, 8),
            value=m.normal(4, 2, 8),
            key_cache=m.poison(2, 4, 2, 8),
            value_cache=m.poison(2, 4, 2, 8),
            slot_mapping=m.ints([8, 1 << 60, -(1 << 62), 7]),
            kv_cache_dtype="auto",
            k_scale=m.floats(1.0),
            v_scale=m.floats(1.0),
        )

    yield Case("reshape_and_cache_flash", "slots-past-the-cache", past_the_cache, 12)


def _packed() -> Iterator[Case]:
    shapes = [(5, 4, 16, 2, 64), (9, 3, 32, 13, 48), (3, 9, 8, 1, 32), (20, 3, 16, 128, 80)]
    for (n, nb, bs, h, d), dtype, kv in itertools.product(shapes, FLOATS, FORMATS):
        x = 16 // cache_dtype(dtype, kv).itemsize
        for interleaved in (False, True):
            if d % x or (interleaved and bs % x):
                continue

            def build(
                m: Maker,
                n: int = n,
                nb: int = nb,
                bs: int = bs,
                h: int = h,
                d: int = d,
                x: int = x,
                dtype: torch.dtype = dtype,
                kv: str = kv,
                interleaved: bool = interleaved,
            ) -> Args:
                return dict(
                    key=special(m, m.rows(n + 1, h, d, dtype=dtype, how="odd")),
                    value=m.rows(n + 1, h, d, dtype=dtype, how="padded"),
                    key_cache=m.poison(nb, h, d // x, bs, x, dtype=cache_dtype(dtype, kv)),
                    value_cache=m.poison(nb, h, d, bs, dtype=cache_dtype(dtype, kv)),
                    slot_mapping=m.slots(n, nb, bs),
                    kv_cache_dtype=kv,
                    k_scale=m.floats(0.6),
                    v_scale=m.floats(2.1),
                    interleaved_v=interleaved,
                )

            yield Case("reshape_and_cache", text(dtype, kv, n, bs, h, d, interleaved), build, 13)


def _mla() -> Iterator[Case]:
    shapes = [(5, 3, 16, 512, 64), (7, 4, 8, 33, 6), (3, 8, 1, 256, 64), (0, 2, 4, 32, 8)]
    for (n, nb, bs, r, p), dtype, kv in itertools.product(shapes, FLOATS, FORMATS):
        for how in ("dense", "padded", "odd"):

            def build(
                m: Maker,
                n: int = n,
                nb: int = nb,
                bs: int = bs,
                r: int = r,
                p: int = p,
                dtype: torch.dtype = dtype,
                kv: str = kv,
                how: str = how,
                fused: bool = False,
            ) -> Args:
                dt = cache_dtype(dtype, kv)
                cache = m.poison(nb, bs, r + p, dtype=dt)
                if how != "dense":
                    cache = m.poison(nb, bs + 1, r + p + 5, dtype=dt)[:, :bs, 3 : r + p + 3]
                common = dict(
                    kv_c=special(m, m.rows(n + 1, r, dtype=dtype, how=how)),
                    k_pe=m.rows(n + 1, p, dtype=dtype, how=how),
                    slot_mapping=m.slots(n, nb, bs),
                    kv_cache=cache,
                    kv_cache_dtype=kv,
                )
                if not fused:
                    return dict(common, scale=m.floats(0.4), skip_scale=how == "odd")
                q = m.normal(n + 1, 3, p, dtype=dtype)
                if how == "padded":
                    q = m.normal(3, n + 1, p + 9, dtype=dtype).transpose(0, 1)[:, :, 2 : p + 2]
                return dict(
                    common,
                    positions=m.ints([m.random.randrange(40) for _ in range(n + 1)]),
                    q_pe=q,
                    cos_sin_cache=m.normal(40, p, dtype=dtype, std=0.7),
                    is_neox=how != "odd",
                    kv_cache_scale=m.floats(0.4),
                )

            def fused_build(m: Maker, build=build) -> Args:
                return build(m, fused=True)

            name = text(dtype, kv, n, bs, r, p, how)
            yield Case("concat_and_cache_mla", name, build, 14)
            # x c - y s may be contracted to one rounding less: the last bit can differ.
            yield Case("concat_and_cache_mla_rope_fused", name, fused_build, 15, 1.0, 0.004)


def _ds_mla() -> Iterator[Case]:
    for dtype, p, how in itertools.product((F16, BF16), (64, 0), ("dense", "padded")):

        def build(m: Maker, dtype: torch.dtype = dtype, p: int = p, how: str = how) -> Args:
            n, nb, bs = 9, 3, 8
            kv_c = m.normal(n, 512, dtype=dtype, std=30.0)
            kv_c[1, :128] = 0.0
            kv_c[2, 130] = math.nan
            kv_c[3, 256:384] = 448.0
            cache = m.poison(nb, bs, 656, dtype=U8)
            if how == "padded":
                cache = m.poison(nb, bs + 1, 672, dtype=U8)[:, :bs, 4:660]
            return dict(
                kv_c=kv_c,
                k_pe=m.normal(n, p, dtype=dtype),
                kv_cache=cache,
                slot_mapping=m.slots(n, nb, bs),
                kv_cache_dtype="fp8_ds_mla",
                scale=m.floats(3.0),
            )

        yield Case("concat_and_cache_mla", text("ds_mla", dtype, p, how), build, 16)


def _convert() -> Iterator[Case]:
    for dtype, kv, n in itertools.product(FLOATS, ("fp8", "fp8_e4m3", "fp8_e5m2"), (0, 1, 5003)):

        def quantize(m: Maker, dtype: torch.dtype = dtype, kv: str = kv, n: int = n) -> Args:
            x = m.poison(n + 3, dtype=dtype)[3:]
            return dict(output=m.poison(n + 1, dtype=U8)[1:], input=x, scale=0.37, kv_dtype=kv)

        def restore(m: Maker, dtype: torch.dtype = dtype, kv: str = kv, n: int = n) -> Args:
            codes = m.poison(n + 3, dtype=U8)[3:]
            return dict(output=m.poison(n, dtype=dtype), input=codes, scale=0.37, kv_dtype=kv)

        yield Case("convert_fp8", text("quantize", dtype, kv, n), quantize, 17)
        yield Case("convert_fp8", text("restore", dtype, kv, n), restore, 18, 0.001)


def _indexer() -> Iterator[Case]:
    for dtype, fmt, qb in itertools.product(
        (F16, BF16), ("ue8m0", "mxfp8", "fp32", "auto"), (32, 64, 128)
    ):

        def build(m: Maker, dtype: torch.dtype = dtype, fmt: str = fmt, qb: int = qb) -> Args:
            n, nb, bs, d = 11, 3, 8, 128
            k = m.normal(n + 1, d, dtype=dtype, std=20.0)
            k[0] = 0.0
            k[1, 3] = math.nan
            return dict(
                k=k,
                kv_cache=m.poison(nb, bs + 1, d + 4 * d // qb, dtype=U8)[:, :bs],
                slot_mapping=m.slots(n, nb, bs),
                quant_block_size=qb,
                kv_cache_dtype=fmt,
            )

        yield Case("indexer_k_quant_and_cache", text(dtype, fmt, qb), build, 22)


def cache_cases() -> Iterator[Case]:
    for family in (_flash, _packed, _mla, _ds_mla, _convert, _indexer):
        yield from family()
