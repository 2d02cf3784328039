"""send / recv over CPU shared memory: tensors, lists, dicts, and the functional interface."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from communicators import Settings, shm
from tests.ranks import Rank, pool
from tests.unit.test_shm_collectives import communicator, inputs, reference_sum, smallest

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int8,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
)


def equal(a: Any, b: Any) -> bool:
    """Same types, dtypes, shapes and bytes, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
        raw = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)] if same else []
        return same and torch.equal(*raw)
    if isinstance(a, dict):
        return (
            isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
        )
    if isinstance(a, list):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def tensor(dtype: torch.dtype, shape: list[int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    size = torch.empty((), dtype=dtype).element_size()
    count = torch.Size(shape).numel() * size
    raw = torch.randint(0, 256, [count], generator=generator).to(torch.uint8)
    return raw.view(dtype).view(shape)


def exchange_list(rank: Rank, tensors: list[torch.Tensor]) -> None:
    """Round the ring of ranks, one hop each: rank 0 starts, so nobody waits in a circle."""
    cpu = communicator(rank)
    after, before = (rank.rank + 1) % rank.world_size, (rank.rank - 1) % rank.world_size
    if rank.rank == 0:
        cpu.send_tensor_list(tensors, after)
        assert equal(cpu.recv_tensor_list(before), tensors)
    else:
        assert equal(cpu.recv_tensor_list(before), tensors)
        cpu.send_tensor_list(tensors, after)


@pytest.mark.parametrize("world", (2, 3, 8))
def test_lists_of_tensors(world: int) -> None:
    every = [tensor(dtype, [5, 3], seed) for seed, dtype in enumerate(DTYPES)]
    shapes: tuple[list[int], ...] = ([], [0], [3, 0, 2], [1], [100_001], [700, 700])
    odd = [tensor(torch.float32, list(shape), seed) for seed, shape in enumerate(shapes)]
    transposed = [tensor(torch.float32, [30, 40], 1).t()]
    ranks = pool(world)
    for tensors in ([], every, odd, transposed, every * 20):
        ranks.run(exchange_list, tensors)


def exchange_dict(rank: Rank, values: dict[str, Any]) -> None:
    cpu = communicator(rank)
    if rank.rank == 0:
        cpu.send_tensor_dict(values, 1)
        assert equal(cpu.recv_tensor_dict(1), values)
    else:
        got = cpu.recv_tensor_dict(0)
        assert equal(got, values), (got, values)
        cpu.send_tensor_dict(got, 0)


tensors_of_any_kind = st.builds(
    tensor,
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 40), max_size=3),
    st.integers(0, 1000),
)
plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.text(max_size=20),
    st.binary(max_size=20),
    st.lists(st.integers(), max_size=5),
)
dicts = st.recursive(
    st.dictionaries(st.text(max_size=8), st.one_of(tensors_of_any_kind, plain), max_size=8),
    lambda inner: st.dictionaries(st.text(max_size=8), st.one_of(inner, plain), max_size=4),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values=dicts)
def test_any_dict_arrives_as_it_was_sent(values: dict[str, Any]) -> None:
    pool(2).run(exchange_dict, values)


def many_entries(rank: Rank) -> None:
    values = {str(i): torch.full((i % 50,), float(i)) for i in range(500)}
    exchange_dict(rank, values)
    exchange_dict(rank, {"big": torch.arange(3_000_000), "small": 1})


def test_many_and_large_entries() -> None:
    pool(2).run(many_entries)


def headers_that_wrap(rank: Rank) -> None:
    """Odd sizes through rings of 1 KB, many times around: some headers lie across the end."""
    cpu = smallest(rank)
    for number in range(1000):
        text = "x" * (number % 97)
        if rank.rank == 0:
            shm.send_object(cpu._handle, text, 1)
        else:
            assert shm.recv_object(cpu._handle, 0) == text, number
    cpu.close()


def test_headers_that_wrap_around_the_end_of_a_ring() -> None:
    pool(2).run(headers_that_wrap)


def both_directions(rank: Rank) -> None:
    """Small messages do not wait for the receiver, so both ranks may send first."""
    cpu = communicator(rank)
    other = 1 - rank.rank
    for number in range(300):
        cpu.send_tensor_list([torch.full((number,), rank.rank)], other)
        cpu.all_reduce_(torch.ones(3))
        assert torch.equal(cpu.recv_tensor_list(other)[0], torch.full((number,), other))


def test_messages_between_collectives() -> None:
    pool(2).run(both_directions)


def functional(rank: Rank, name: str) -> None:
    w, me = rank.world_size, rank.rank
    handle = shm.init_shm_manager(name, w, me, Settings(timeout_s=30.0))
    assert shm.join_shm_manager(handle, name) == name
    parts = inputs(w, [50, 60], torch.bfloat16, seed=1)
    data = parts[me].clone()
    shm.shm_allreduce(handle, data)
    assert torch.equal(data, reference_sum(parts))
    outputs = [torch.empty_like(parts[0]) for _ in range(w)] if me == 1 else None
    shm.shm_gather(handle, parts[me], outputs, 1)
    assert outputs is None or all(map(torch.equal, outputs, parts))
    output = parts[0].new_empty([w * 50, 60])
    shm.shm_all_gather(handle, parts[me], output)
    assert torch.equal(output, torch.cat(parts))
    nine = [tensor(torch.int64, [i], i) for i in range(9)]
    if me == 0:
        shm.shm_send_tensor_list(handle, nine, 2)
    elif me == 2:
        assert equal(shm.shm_recv_tensor_list(handle, 0), nine)
    shm.close_shm_manager(handle)
    with pytest.raises(ValueError, match="not the handle of an open group"):
        shm.shm_allreduce(handle, data)


def test_functional_interface() -> None:
    name = f"functional-{os.getpid()}"
    pool(3).run(functional, name)
    pool(3).run(functional, name)  # the name is free again


def wrong_arguments(rank: Rank) -> None:
    cpu = communicator(rank)
    x = torch.ones(4)
    with pytest.raises(ValueError, match="bool cannot be summed"):
        cpu.all_reduce_(x.bool())
    with pytest.raises(ValueError, match="dim=2"):
        cpu.all_gather(x, 2)
    with pytest.raises(ValueError, match="the ranks of this group are 0"):
        cpu.gather(x, 2)
    with pytest.raises(ValueError, match="not a multiple of the 2 ranks"):
        cpu.reduce_scatter(torch.ones(3))
    with pytest.raises(ValueError, match="this rank itself"):
        cpu.send_tensor_list([x], rank.rank)
    with pytest.raises(ValueError, match="out has 4 elements"):
        cpu.run("all_gather", torch.empty(4), x)
    with pytest.raises(ValueError, match="they must have one dtype"):
        cpu.run("all_reduce", torch.empty(4, dtype=torch.int32), x)
    # None of these has started a collective: the group still works.
    assert torch.equal(cpu.all_reduce(x), 2 * x)


def test_wrong_arguments_name_the_rule_and_do_no_harm() -> None:
    pool(2).run(wrong_arguments)
