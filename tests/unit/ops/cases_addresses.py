"""Cases of the ops that take addresses; the memory hangs on the tensor of addresses."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tests.unit.ops.ops_maker import BF16, U8, Args, Case, Maker, pointing


def _grouped() -> Iterator[Case]:
    shapes = [(3, 5, 3, 16, 512, 64), (1, 7, 4, 8, 33, 6), (2, 0, 2, 4, 32, 8), (5, 3, 6, 1, 64, 1)]
    for (layers, n, nb, bs, r, p), kv, scaled in itertools.product(
        shapes, ("auto", "bfloat16", "fp8", "fp8_e5m2"), (False, True)
    ):

        def build(
            m: Maker,
            layers: int = layers,
            n: int = n,
            nb: int = nb,
            bs: int = bs,
            r: int = r,
            p: int = p,
            kv: str = kv,
            scaled: bool = scaled,
        ) -> Args:
            dtype = U8 if kv.startswith("fp8") else BF16
            wide = r + p + (5 if scaled else 0)  # entries and blocks with gaps after them
            blocks = bs + scaled
            caches = [m.poison(nb, blocks, wide, dtype=dtype) for _ in range(layers)]
            slots = [m.slots(n, nb, bs) for _ in range(layers)]
            return dict(
                kv_c=m.normal(layers, n, r, dtype=BF16),
                k_pe=m.normal(layers, n, p, dtype=BF16),
                kv_cache_ptrs=pointing(m, caches),
                slot_mapping=torch.stack(slots),
                block_size=bs,
                block_stride=blocks * wide,
                entry_stride=wide,
                kv_scales=m.floats(*(0.3 + 0.2 * i for i in range(layers))) if scaled else None,
                kv_cache_dtype=kv,
            )

        name = f"{layers}-{n}-{nb}-{bs}-{r}-{p}-{kv}-{'scaled' if scaled else 'plain'}"
        yield Case("concat_and_cache_mla_grouped", name, build, 25)


def _grouped_views() -> Iterator[Case]:
    """Slots of one layer for all, of every other layer or token, rows inside wider ones."""
    views: dict[str, Callable[[Tensor, int], Tensor]] = {
        "expanded": lambda x, width: x[:1, :, :width].expand(3, -1, -1),
        "one-token": lambda x, width: x[:, :1, :width].expand(-1, 5, -1),
        "padded": lambda x, width: x[:, :, 1 : width + 1],
        "transposed": lambda x, width: x.transpose(0, 1).contiguous().transpose(0, 1)[..., :width],
    }
    for (name, view), kv in itertools.product(views.items(), ("auto", "fp8")):

        def build(m: Maker, view: Callable[[Tensor, int], Tensor] = view, kv: str = kv) -> Args:
            caches = [m.poison(4, 8, 40, dtype=U8 if kv == "fp8" else BF16) for _ in range(3)]
            slots = torch.stack([m.slots(5, 4, 8) for _ in range(3)])
            return dict(
                kv_c=view(m.normal(3, 5, 36, dtype=BF16), 32),
                k_pe=view(m.normal(3, 5, 9, dtype=BF16), 8),
                kv_cache_ptrs=pointing(m, caches),
                slot_mapping=view(slots.unsqueeze(2).expand(-1, -1, 2), 1).squeeze(2),
                block_size=8,
                block_stride=320,
                entry_stride=40,
                kv_scales=m.floats(0.3, 0.5, 0.7).view(3, 1, 1),
                kv_cache_dtype=kv,
            )

        yield Case("concat_and_cache_mla_grouped", f"{name}-{kv}", build, 27)


def _swap_batch() -> Iterator[Case]:
    for n, size in itertools.product((0, 1, 7), (0, 1, 24, 4096)):

        def build(m: Maker, n: int = n, size: int = size) -> Args:
            sources = [m.poison(size + i, dtype=U8) for i in range(n)]
            targets = [m.poison(size + i + 2, dtype=U8)[1:] for i in range(n)]
            sizes = [size + i for i in range(n)]
            return dict(
                src_ptrs=pointing(m, sources),
                dst_ptrs=pointing(m, targets),
                sizes=torch.tensor(sizes, dtype=torch.int64),
                is_src_access_order_any=bool(n % 2),
            )

        yield Case("swap_blocks_batch", f"{n}-{size}", build, 26)


def address_cases() -> Iterator[Case]:
    """Of the CPU: the references follow an address as the host does."""
    yield from _grouped()
    yield from _grouped_views()
    yield from _swap_batch()
