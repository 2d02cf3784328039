"""A paged KV cache: fixed-size blocks, a table of blocks per sequence, slots for new tokens.

The idea is PagedAttention's (arXiv:2309.06180). The cache of a layer has the flash layout
``[blocks, block size, KV heads, head dim]``; slot ``s`` is row ``s % block size`` of block
``s // block size``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import JobError


class BlockAllocator:
    """Hands out block numbers 0 .. num_blocks-1, each to one owner at a time."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._taken: set[int] = set()

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """``count`` blocks, or JobError and none taken."""
        if count > len(self._free):
            raise JobError(
                f"the KV cache has {len(self._free)} of {self.num_blocks} blocks free; {count} "
                f"are needed"
            )
        blocks = [self._free.pop() for _ in range(count)]
        self._taken.update(blocks)
        return blocks

    def free(self, blocks: list[int]) -> None:
        """Give blocks back; ValueError for a block that is not taken."""
        for block in blocks:
            if block not in self._taken:
                raise ValueError(f"block {block} of {self.num_blocks} is not taken")
            self._taken.remove(block)
            self._free.append(block)


@dataclass
class Sequence:
    """The blocks of one sequence and how many tokens lie in them."""

    blocks: list[int] = field(default_factory=list)
    length: int = 0


class BlockTables:
    """Grows and ends sequences; the pure bookkeeping behind the cache, on the host."""

    def __init__(self, allocator: BlockAllocator, block_size: int) -> None:
        self.allocator = allocator
        self.block_size = block_size

    def append(self, sequence: Sequence, tokens: int) -> list[int]:
        """Make room for ``tokens`` more tokens; their slots, in order."""
        length = sequence.length + tokens
        needed = -(-length // self.block_size) - len(sequence.blocks)
        if needed > 0:
            sequence.blocks += self.allocator.allocate(needed)
        slots = [
            sequence.blocks[i // self.block_size] * self.block_size + i % self.block_size
            for i in range(sequence.length, length)
        ]
        sequence.length = length
        return slots

    def release(self, sequence: Sequence) -> None:
        self.allocator.free(sequence.blocks)
        sequence.blocks, sequence.length = [], 0


@dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values, and how they are stored."""

    key: Tensor
    value: Tensor
    dtype: str
    k_scale: Tensor
    v_scale: Tensor


class PagedKVCache:
    """The memory of all layers.

    Args:
        layers, blocks, block_size, kv_heads, head_dim: sizes; kv_heads are this rank's.
        kv_cache_dtype: "auto" (as ``dtype``) or "fp8" (e4m3, scale 1, half the memory of bf16).
    """

    def __init__(
        self,
        layers: int,
        blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        kv_cache_dtype: str = "auto",
    ) -> None:
        stored = dtype if kv_cache_dtype == "auto" else torch.uint8
        shape = (blocks, block_size, kv_heads, head_dim)
        one = torch.ones(1, dtype=torch.float32, device=device)
        self.layers = [
            LayerCache(
                key=torch.zeros(shape, dtype=stored, device=device),
                value=torch.zeros(shape, dtype=stored, device=device),
                dtype=kv_cache_dtype,
                k_scale=one,
                v_scale=one,
            )
            for _ in range(layers)
        ]

    @property
    def nbytes(self) -> int:
        return sum(layer.key.nbytes + layer.value.nbytes for layer in self.layers)
