"""Blocks: no two sequences share one, none is lost, slots address the right row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scripts.tp_llama.errors import JobError
from scripts.tp_llama.kv_cache import BlockAllocator, BlockTables, PagedKVCache, Sequence

# (which sequence, how many tokens more; 0 ends it)
STEPS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 40)), max_size=60)


@given(STEPS, st.integers(1, 40), st.sampled_from([1, 8, 16]))
def test_blocks_are_never_shared_or_lost(
    steps: list[tuple[int, int]], num_blocks: int, block_size: int
) -> None:
    allocator = BlockAllocator(num_blocks)
    tables = BlockTables(allocator, block_size)
    sequences = [Sequence() for _ in range(5)]
    slots: list[list[int]] = [[] for _ in sequences]
    for which, tokens in steps:
        sequence = sequences[which]
        before = list(sequence.blocks), sequence.length, allocator.free_blocks
        if tokens == 0:
            tables.release(sequence)
            slots[which] = []
        else:
            needed = -(-(sequence.length + tokens) // block_size) - len(sequence.blocks)
            try:
                slots[which] += tables.append(sequence, tokens)
            except JobError:
                assert needed > before[2]
                assert (sequence.blocks, sequence.length, allocator.free_blocks) == before
                continue
            assert needed <= before[2]
        held = [block for s in sequences for block in s.blocks]
        assert len(set(held)) == len(held) == num_blocks - allocator.free_blocks
        assert set(held) <= set(range(num_blocks))
        every_slot = [slot for of_one in slots for slot in of_one]
        assert len(set(every_slot)) == len(every_slot)
        for s, of_one in zip(sequences, slots, strict=True):
            assert len(of_one) == s.length
            assert len(s.blocks) == -(-s.length // block_size)
            # The table finds each token again: this is how attention reads it.
            for position, slot in enumerate(of_one):
                assert slot // block_size == s.blocks[position // block_size]
                assert slot % block_size == position % block_size


def test_too_many_blocks_are_refused_whole() -> None:
    allocator = BlockAllocator(3)
    allocator.allocate(1)
    with pytest.raises(JobError, match="2 of 3 blocks free; 3 are needed"):
        allocator.allocate(3)
    assert allocator.free_blocks == 2


def test_a_block_is_freed_once() -> None:
    allocator = BlockAllocator(2)
    blocks = allocator.allocate(1)
    allocator.free(blocks)
    with pytest.raises(ValueError, match="is not taken"):
        allocator.free(blocks)
    with pytest.raises(ValueError, match="block 7 of 2 is not taken"):
        allocator.free([7])


def test_memory() -> None:
    def cache(kind: str) -> PagedKVCache:
        return PagedKVCache(3, 5, 16, 2, 32, torch.bfloat16, torch.device("cpu"), kind)

    assert cache("auto").layers[2].key.shape == (5, 16, 2, 32)
    assert cache("auto").nbytes == 3 * 2 * 5 * 16 * 2 * 32 * 2
    assert cache("fp8").nbytes == cache("auto").nbytes // 2
    assert cache("fp8").layers[0].value.dtype == torch.uint8
