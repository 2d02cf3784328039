"""Collectives over CPU shared memory against one reference, exactly: the sum in rank order in fp32,
rounded once."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import re
import time

import pytest
import torch

from communicators import CpuCommunicator, Settings
from tests.ranks import Rank, pool

WORLDS = (2, 3, 4, 5, 8)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
DTYPES = FLOATS + INTEGERS
# Elements: none, beside the flag, one-shot, around a slot's chunks, several chunks, odd.
SIZES = (0, 1, 7, 12, 13, 1000, 32768, 65536, 65537, 131072 + 3, 700_003)


def communicator(rank: Rank) -> CpuCommunicator:
    if "cpu" not in rank.cache:
        opened = CpuCommunicator(
            rank.group(timeout_s=120.0 if rank.world_size > 16 else 30.0), torch.device("cpu")
        )
        assert opened.refusal is None, opened.refusal
        rank.cache["cpu"] = opened
    return rank.cache["cpu"]


@functools.cache
def values_of(dtype: torch.dtype) -> torch.Tensor:
    """Random values to take slices of; making new ones for every rank would take the tests' time.

    Of very different magnitudes: sums in another order would differ.
    """
    generator = torch.Generator().manual_seed(0)
    count = 1_500_000
    if not dtype.is_floating_point:
        return torch.randint(-128, 128, [count], generator=generator).to(dtype)
    scale = 10.0 ** torch.randint(-3, 3, [count], generator=generator)
    return (torch.randn([count], generator=generator) * scale).to(dtype)


def inputs(world: int, shape: list[int] | int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """Every rank's input, the same on all ranks."""
    shape = [shape] if isinstance(shape, int) else shape
    count, values = math.prod(shape), values_of(dtype)
    room = len(values) - count
    starts = [(seed * 7919 + rank * 104_729) % room for rank in range(world)]
    return [values[start : start + count].clone().view(shape) for start in starts]


def reference_sum(parts: list[torch.Tensor]) -> torch.Tensor:
    dtype = parts[0].dtype
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)
    return total.to(dtype)


def check_all_reduce(rank: Rank, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    cpu = communicator(rank)
    for size in sizes:
        parts = inputs(rank.world_size, size, dtype, seed=size)
        expected = reference_sum(parts)
        mine = parts[rank.rank]
        before = mine.clone()
        got = cpu.all_reduce(mine)
        assert torch.equal(got, expected), (dtype, size, "out of place")
        assert torch.equal(mine, before), (dtype, size, "the input changed")
        assert cpu.all_reduce_(mine) is mine
        assert torch.equal(mine, expected), (dtype, size, "in place")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("world", WORLDS)
def test_all_reduce(world: int, dtype: torch.dtype) -> None:
    pool(world).run(check_all_reduce, dtype, SIZES)


def check_every_algorithm(rank: Rank, dtype: torch.dtype) -> None:
    cpu = communicator(rank)
    torch.set_num_threads(2)
    tune = torch.ops.communicators.shm_set_tuning
    try:
        for size in (8, 100, 5000, 40_000, 200_001):
            parts = inputs(rank.world_size, size, dtype, seed=size)
            expected = reference_sum(parts)
            for one_shot, chunk, threads in (
                (0, 16384, 1),
                (0, 65536, 1),
                (0, 1 << 20, 1),
                (1 << 20, 16384, 1),
                (0, 1 << 20, 2),  # torch's pool shares the work
                (1 << 20, 16384, 2),
            ):
                cpu.barrier()
                tune(cpu._handle, one_shot, chunk, threads)
                assert torch.equal(cpu.all_reduce(parts[rank.rank]), expected), (size, one_shot)
    finally:
        torch.set_num_threads(1)
        cpu.close()
        del rank.cache["cpu"]


def check_lanes(rank: Rank, lanes: int) -> None:
    """Calls of all kinds, some on one lane and some on several, without barriers in between."""
    cpu = communicator(rank)
    tune = torch.ops.communicators.shm_set_tuning
    torch.set_num_threads(lanes if rank.rank != 1 else 1)  # one thread takes lanes after another
    try:
        tune(cpu._handle, 65536, 262144, lanes)
        assert torch.ops.communicators.shm_plan(cpu._handle)[1] == lanes
        for seed in range(2):
            check_random_sequence(rank, seed, 40, (10, 20_000, 120_000, 300_001))
        for dim in (0, 1):
            parts = inputs(rank.world_size, [300, 400 * rank.world_size], torch.float32, seed=dim)
            mine = parts[rank.rank]
            assert torch.equal(cpu.all_gather(mine, dim), torch.cat(parts, dim))
            expected = reference_sum(parts).chunk(rank.world_size, dim)[rank.rank]
            assert torch.equal(cpu.reduce_scatter(mine, dim), expected)
    finally:
        torch.set_num_threads(1)
        cpu.close()
        del rank.cache["cpu"]


@pytest.mark.parametrize(("world", "lanes"), ((2, 2), (2, 5), (3, 4)))
def test_lanes(world: int, lanes: int) -> None:
    pool(world).run(check_lanes, lanes)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("world", (2, 3, 5))
def test_all_algorithms_give_the_same_bits(world: int, dtype: torch.dtype) -> None:
    pool(world).run(check_every_algorithm, dtype)


def check_special_values(rank: Rank, dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    big = torch.finfo(dtype).max
    tiny = torch.finfo(dtype).smallest_normal / 4  # subnormal
    values = torch.tensor([inf, -inf, nan, big, -big, tiny, -tiny, 0.0, -0.0] * 9, dtype=dtype)
    other = torch.tensor([1.0, 1.0, 1.0, big, -big, tiny, -tiny, 0.0, -0.0] * 9, dtype=dtype)
    parts = [values if r == 0 else other for r in range(rank.world_size)]
    got = communicator(rank).all_reduce(parts[rank.rank])
    expected = reference_sum(parts)
    assert torch.equal(got.isnan(), expected.isnan())
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    keep = ~expected.isnan()
    assert torch.equal(got.view(bits)[keep], expected.view(bits)[keep])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("world", (2, 3))
def test_infinities_nan_and_subnormals(world: int, dtype: torch.dtype) -> None:
    pool(world).run(check_special_values, dtype)


def check_every_half(rank: Rank) -> None:
    """All 65536 fp16 values plus random others; some of them seven at a time, since whole vectors
    and what is left over are converted by different code."""
    cpu = communicator(rank)
    bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    generator = torch.Generator().manual_seed(3)
    parts = [bits[torch.randperm(65536, generator=generator)].view(torch.float16) for _ in "ab"]
    expected = reference_sum(parts)
    mine = parts[rank.rank]
    some = torch.cat([cpu.all_reduce(seven) for seven in mine[:3500].split(7)])
    for got, wanted in ((cpu.all_reduce(mine), expected), (some, expected[:3500])):
        assert torch.equal(got.isnan(), wanted.isnan())
        keep = ~wanted.isnan()
        assert torch.equal(got.view(torch.int16)[keep], wanted.view(torch.int16)[keep])


def test_every_fp16_value() -> None:
    pool(2).run(check_every_half)


def check_non_contiguous(rank: Rank) -> None:
    cpu = communicator(rank)
    parts = [x[:, ::2] for x in inputs(rank.world_size, [30, 50], torch.float32, seed=1)]
    expected = reference_sum(parts)
    got = cpu.all_reduce(parts[rank.rank])
    assert torch.equal(got, expected) and got.is_contiguous()
    base = inputs(rank.world_size, [30, 50], torch.float32, seed=1)[rank.rank]
    untouched = base[:, 1::2].clone()
    view = base[:, ::2]
    cpu.all_reduce_(view)
    assert torch.equal(view, expected)
    assert torch.equal(base[:, 1::2], untouched)
    sent = inputs(rank.world_size, [30, 50], torch.float32, seed=2)
    x = sent[rank.rank].clone().t()
    cpu.broadcast(x, 1)
    assert torch.equal(x, sent[1].t())


def test_non_contiguous_tensors_are_staged() -> None:
    pool(3).run(check_non_contiguous)


SHAPES = ([1], [7], [4, 6], [3, 4, 5], [2, 1, 300], [40_000], [8, 12, 1024], [3, 60_001])


def check_gathers(rank: Rank, dtype: torch.dtype) -> None:
    cpu = communicator(rank)
    w = rank.world_size
    for number, shape in enumerate(SHAPES):
        parts = inputs(w, shape, torch.float32, seed=number)
        parts = [(x > 0) if dtype == torch.bool else x.to(dtype) for x in parts]
        mine = parts[rank.rank]
        for dim in range(-1, len(shape)):
            expected = torch.cat(parts, dim)
            assert torch.equal(cpu.all_gather(mine, dim), expected), ("all_gather", shape, dim)
            root = (number + dim) % w
            got = cpu.gather(mine, root, dim)
            if rank.rank == root:
                assert got is not None and torch.equal(got, expected), ("gather", shape, dim)
            else:
                assert got is None
        received = parts[rank.rank].clone()
        cpu.broadcast(received, number % w)
        assert torch.equal(received, parts[number % w]), ("broadcast", shape)
    assert cpu.all_gather(torch.empty(3, 0, dtype=dtype), 0).shape == (3 * w, 0)
    assert torch.equal(cpu.all_gather(torch.tensor(rank.rank)), torch.arange(w))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bool, torch.bfloat16), ids=str)
@pytest.mark.parametrize("world", WORLDS)
def test_all_gather_gather_broadcast(world: int, dtype: torch.dtype) -> None:
    pool(world).run(check_gathers, dtype)


def check_reduce_scatter(rank: Rank, dtype: torch.dtype) -> None:
    cpu = communicator(rank)
    w = rank.world_size
    for number, shape in enumerate(SHAPES):
        for dim in range(-1, len(shape)):
            whole = list(shape)
            whole[dim] *= w
            parts = inputs(w, whole, dtype, seed=number)
            expected = reference_sum(parts).chunk(w, dim)[rank.rank]
            got = cpu.reduce_scatter(parts[rank.rank], dim)
            assert torch.equal(got, expected), (shape, dim)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.int64), ids=str)
@pytest.mark.parametrize("world", WORLDS)
def test_reduce_scatter(world: int, dtype: torch.dtype) -> None:
    pool(world).run(check_reduce_scatter, dtype)


def check_random_sequence(
    rank: Rank, seed: int, calls: int, sizes: tuple[int, ...] = (10, 500, 20_000, 120_000)
) -> None:
    """Calls of all kinds after one another, without barriers: slots are reused across kinds."""
    cpu = communicator(rank)
    w = rank.world_size
    generator = torch.Generator().manual_seed(seed)

    def pick(high: int) -> int:
        return int(torch.randint(0, high, (1,), generator=generator))

    for number in range(calls):
        kind, size, root = pick(6), pick(sizes[pick(len(sizes))]) + 1, pick(w)
        parts = inputs(w, size * (w if kind == 3 else 1), torch.bfloat16, seed=number)
        mine = parts[rank.rank].clone()
        where = (seed, number, kind, size, root)
        if kind == 0:
            assert torch.equal(cpu.all_reduce_(mine), reference_sum(parts)), where
        elif kind == 1:
            assert torch.equal(cpu.all_gather(mine), torch.cat(parts)), where
        elif kind == 2:
            got = cpu.gather(mine, root)
            assert got is None or torch.equal(got, torch.cat(parts)), where
        elif kind == 3:
            expected = reference_sum(parts).chunk(w)[rank.rank]
            assert torch.equal(cpu.reduce_scatter(mine), expected), where
        elif kind == 4:
            assert torch.equal(cpu.broadcast(mine, root), parts[root]), where
        elif rank.rank == root:
            cpu.send_tensor_list([parts[root]], (root + 1) % w)
        elif rank.rank == (root + 1) % w:
            assert torch.equal(cpu.recv_tensor_list(root)[0], parts[root]), where


@pytest.mark.parametrize("seed", (0, 1))
@pytest.mark.parametrize("world", (2, 3, 5))
def test_a_random_sequence_of_calls(world: int, seed: int) -> None:
    pool(world).run(check_random_sequence, seed, 150)


def check_two_groups(rank: Rank) -> None:
    first = CpuCommunicator(rank.group("first", timeout_s=30.0), torch.device("cpu"))
    second = CpuCommunicator(rank.group("second", timeout_s=30.0), torch.device("cpu"))
    for number in range(20):
        parts = inputs(rank.world_size, 999, torch.float32, seed=number)
        expected = reference_sum(parts)
        assert torch.equal(first.all_reduce(parts[rank.rank]), expected)
        assert torch.equal(second.all_reduce(parts[rank.rank]), expected)
    first.close()
    assert first.disabled and not second.disabled
    second.barrier()
    second.close()
    second.close()


def test_several_groups_at_once() -> None:
    pool(3).run(check_two_groups)


def smallest(rank: Rank) -> CpuCommunicator:
    """One with the least memory that is accepted."""
    device = torch.device("cpu")
    refusal = CpuCommunicator(rank.group("none"), device, Settings(shm_bytes=0)).refusal
    needed = re.search(r"(\d+) are needed", str(refusal))
    assert needed is not None, refusal
    small = Settings(shm_bytes=int(needed[1]), timeout_s=30.0)
    return CpuCommunicator(rank.group("least"), device, small)


def check_least_memory(rank: Rank) -> None:
    cpu = smallest(rank)
    for size in (1, 100, 5001):
        parts = inputs(rank.world_size, size * rank.world_size, torch.float64, seed=size)
        expected = reference_sum(parts)
        assert torch.equal(cpu.all_reduce(parts[rank.rank]), expected)
        assert torch.equal(
            cpu.reduce_scatter(parts[rank.rank]), expected.chunk(rank.world_size)[rank.rank]
        )
        assert torch.equal(cpu.all_gather(parts[rank.rank]), torch.cat(parts))
    if rank.rank == 0:
        cpu.send_tensor_list(parts, 1)
    elif rank.rank == 1:
        assert all(map(torch.equal, cpu.recv_tensor_list(0), parts))
    cpu.close()


@pytest.mark.parametrize("world", (2, 3, 16))
def test_the_least_memory_that_is_accepted_works(world: int) -> None:
    pool(world).run(check_least_memory)


def check_forked_child(rank: Rank) -> None:
    cpu = communicator(rank)
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).exit(0)  # with destructors, as a program that ends
    os.waitpid(child, 0)
    time.sleep(0.1 * rank.rank)  # so that one rank waits for the other
    assert torch.equal(cpu.all_reduce(torch.ones(5)), torch.full((5,), 2.0))


def test_a_forked_child_that_exits_does_not_close_the_group() -> None:
    pool(2).run(check_forked_child)


def check_many_ranks(rank: Rank) -> None:
    cpu = communicator(rank)
    for size in (1, 1000, 70_000):
        parts = inputs(rank.world_size, size, torch.bfloat16, seed=size)
        assert torch.equal(cpu.all_reduce(parts[rank.rank]), reference_sum(parts))
        assert torch.equal(cpu.all_gather(parts[rank.rank]), torch.cat(parts))
    cpu.barrier()


def test_64_ranks() -> None:
    ranks = pool(64)
    try:
        ranks.run(check_many_ranks, deadline_s=300)
    finally:
        ranks.kill()


def test_a_single_rank_and_65_are_refused() -> None:
    assert pool(2).run(refusal_of_world_size, 1) == ["world size 1 is not in 2..64"] * 2


def refusal_of_world_size(rank: Rank, world_size: int) -> str:
    group = rank.group("alone")
    group.rank, group.world_size = 0, world_size
    return str(CpuCommunicator(group, torch.device("cpu")).refusal)
