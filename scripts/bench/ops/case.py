"""What a case of the case ops_cpu is, and the shapes that all of them share.

Shapes are those of a model with hidden size 4096, 32 query and 8 KV heads of 128, blocks of 16
tokens; MLA with a latent of 512 and 64 rotary elements. Blocks lie anywhere in the cache, the
tokens of a block one after the other, as a prefill leaves them; a cache that is written to holds
other sequences too, and most neighbours of a block are theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kvcache_ops

from . import plain
from .plain import BF16, BLOCK, F32, SCALE

HIDDEN, HEADS, KV_HEADS, HEAD = 4096, 32, 8, 128
LATENT, ROPE, MLA_HEADS = 512, 64, 16
MAX_POSITION = 4096
F16 = torch.float16
SIXTEEN = (BF16, F16)


@dataclass
class Case:
    """One op on one set of tensors."""

    op: str
    dtype: torch.dtype
    ours: Callable[..., None]
    plain: Callable[..., Tensor | None]
    tensors: dict[str, Any]  # arguments of ours
    written: tuple[str, ...]  # what plain returns, if anything, is the first of them
    moved: int  # bytes that must be read and written once
    variant: str = ""
    tolerance: float = 0.0
    other: dict[str, Any] | None = None  # arguments of plain where they are not those of ours
    memory_bound: bool = True


def case(op: str, dtype: torch.dtype, tensors: dict[str, Any], **more: Any) -> Case:
    """Ours and plain torch are found by the op's name, unless ``more`` says otherwise."""
    more.setdefault("plain", getattr(plain, op, None))
    return Case(op=op, dtype=dtype, ours=getattr(kvcache_ops, op), tensors=tensors, **more)


def randn(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.itemsize for t in tensors)


def cache_blocks(n: int) -> int:
    """Blocks of a cache that n tokens are written to: four times as many as they fill."""
    return 4 * (n // BLOCK + 1)


def slots(n: int) -> Tensor:
    """n slots: blocks in a random order, the tokens of a block side by side."""
    blocks = torch.randperm(cache_blocks(n))[: n // BLOCK + 1].unsqueeze(1)
    return (blocks * BLOCK + torch.arange(BLOCK)).flatten()[:n].contiguous()


def one(value: float = SCALE) -> Tensor:
    return torch.tensor([value])


def error_of(dtype: torch.dtype) -> float:
    return {F32: 1e-4, F16: 4e-3, BF16: 3e-2}[dtype]


def angles(width: int, dtype: torch.dtype) -> Tensor:
    turns = torch.rand(MAX_POSITION, width // 2) * 6
    return torch.cat([turns.cos(), turns.sin()], dim=1).to(dtype)
