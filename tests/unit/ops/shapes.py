"""Hypothesis strategies for the ops: shapes, dtypes, and where in memory the elements lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.ops.ops_maker import FLOATS, U8, Maker

dtypes = st.sampled_from(FLOATS)
seeds = st.integers(0, 10_000)
formats = st.sampled_from(("auto", "fp8", "fp8_e5m2"))
block_sizes = st.sampled_from((1, 3, 8, 16, 32, 64))
head_counts = st.one_of(st.integers(1, 9), st.sampled_from((13, 32, 128)))
head_sizes = st.one_of(st.sampled_from((32, 64, 80, 128, 192, 256)), st.integers(1, 70))


@dataclass(frozen=True)
class Frame:
    """A view inside a larger, poisoned memory: the order of its dimensions there, the gap after
    each of them, the elements before the first."""

    order: tuple[int, ...]
    gaps: tuple[int, ...]
    before: int

    def view(self, m: Maker, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A poisoned tensor of that shape."""
        strides, step = [0] * len(shape), 1
        for d in reversed(self.order):
            strides[d] = step
            step = step * max(shape[d], 1) + self.gaps[d]
        whole = m.poison(self.before + step + 9, dtype=dtype)
        return whole.as_strided(shape, strides, self.before)

    def normal(self, m: Maker, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Ordinary values in such a view; codes of them for uint8."""
        x = self.view(m, shape, dtype)
        values = torch.randn(shape, generator=m.generator)
        x.copy_(values.to(torch.float8_e4m3fn).view(U8) if dtype == U8 else values.to(dtype))
        return x


@st.composite
def frames(
    draw: st.DrawFn, rank: int, dense_from: int | None = None, permuted: bool = False
) -> Frame:
    """Frames for a rank; from ``dense_from`` on (the last dimension unless said) without gaps."""
    dense = rank - 1 if dense_from is None else dense_from
    order = list(range(rank))
    if permuted:
        order = [*draw(st.permutations(range(dense))), *range(dense, rank)]
    gaps = [draw(st.integers(0, 5)) if d <= dense else 0 for d in range(rank)]
    return Frame(tuple(order), tuple(gaps), draw(st.integers(0, 7)))


@st.composite
def slot_lists(draw: st.DrawFn, limit: int, most: int = 12) -> list[int]:
    """Different slots, some negative and some past the cache."""
    slots = draw(st.lists(st.integers(0, limit - 1), unique=True, max_size=min(most, limit)))
    outside = st.sampled_from((None, None, None, -1, -(1 << 40), limit, 1 << 60))
    replaced = [draw(outside) for _ in slots]
    return [s if r is None else r for s, r in zip(slots, replaced, strict=True)]
