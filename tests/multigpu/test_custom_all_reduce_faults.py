"""Faults of CustomAllreduce on two GPUs, each on ranks of its own: it leaves one unusable."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from communicators.backends.custom_all_reduce import CustomAllreduce
from communicators.errors import CommMismatchError, CommTimeoutError, CommunicatorError
from communicators.settings import Settings
from tests.multigpu.test_custom_all_reduce import _open
from tests.ranks import Rank, Ranks

pytestmark = [
    pytest.mark.multigpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA GPUs"),
]


@pytest.fixture
def doomed() -> Iterator[Ranks]:
    made = Ranks(2, gpus=True)
    made.run(_open, deadline_s=120)
    yield made
    made.kill()


def _mismatch(me: Rank) -> str:
    comm = me.cache["comm"]
    comm.set_timeout(0.5)
    with pytest.raises(CommTimeoutError) as caught:
        comm.all_reduce(torch.ones(100_000 if me.rank == 0 else 1000, device=me.device))
        comm.synchronize()
        comm.all_reduce(torch.ones(1000, device=me.device))
        comm.synchronize()
    with pytest.raises(CommTimeoutError):
        comm.all_reduce(torch.ones(1000, device=me.device))
    assert torch.ones(8, device=me.device).sum().item() == 8  # the context is not poisoned
    comm.close()
    return str(caught.value)


def test_different_sizes_meet_the_deadline(doomed: Ranks) -> None:
    for rank, message in enumerate(doomed.run(_mismatch)):
        assert f"on rank {rank} of 2" in message
        assert f"for rank {1 - rank}" in message


def _debug(me: Rank) -> None:
    comm = CustomAllreduce(me.world, me.device, settings=Settings(debug=True))
    with pytest.raises(CommMismatchError, match=r"of (8|16) .* all_reduce of (16|8) "):
        comm.all_reduce(torch.ones(8 * (me.rank + 1), device=me.device))
    comm.close()


def test_different_sizes_in_debug_mode(doomed: Ranks) -> None:
    doomed.run(_debug)


def _uneven_capture(me: Rank) -> None:
    comm = me.cache["comm"]
    x = torch.ones(64, device=me.device)
    graph = torch.cuda.CUDAGraph()
    uneven = pytest.raises(CommMismatchError, match="rank 0: 1, rank 1: 2")
    with uneven, comm.capture(), torch.cuda.graph(graph):
        for _ in range(me.rank + 1):
            comm.all_reduce(x)


def test_uneven_captures(doomed: Ranks) -> None:
    doomed.run(_uneven_capture)


def _failed_capture(me: Rank) -> None:
    comm = me.cache["comm"]
    if me.rank == 0:
        with pytest.raises(ZeroDivisionError), comm.capture():
            raise ZeroDivisionError  # no exchange follows, or rank 1 would be missed


def test_a_failed_capture_exchanges_nothing(doomed: Ranks) -> None:
    doomed.run(_failed_capture)


def _replay_after_close(me: Rank, scope: bool) -> None:
    comm = me.cache["comm"]
    x = torch.ones(64, device=me.device)
    graph = torch.cuda.CUDAGraph()
    with comm.capture() if scope else nullcontext(), torch.cuda.graph(graph):
        out = comm.all_reduce(x)
    me.world.barrier()
    comm.close()
    out.fill_(-7)
    graph.replay()
    torch.cuda.synchronize()
    assert (out == -7).all()
    assert torch.ones(8, device=me.device).sum().item() == 8
    me.world.barrier()


@pytest.mark.parametrize("scope", [True, False])
def test_replay_after_close_does_not_fault(doomed: Ranks, scope: bool) -> None:
    doomed.run(_replay_after_close, scope)


def _two_streams(me: Rank) -> None:
    comm = me.cache["comm"]
    x = torch.ones(64, device=me.device)
    if me.rank == 1:
        time.sleep(1)  # rank 0's first call is in flight meanwhile
    else:
        out = torch.empty_like(x)  # taken now: an allocation may wait for the device
        other = torch.cuda.Stream()
        comm.all_reduce(x, out=out)
        with torch.cuda.stream(other):
            comm.all_reduce(x, out=out)
        with pytest.raises(CommunicatorError, match="another call in flight"):
            comm.synchronize()


def test_two_streams_at_once(doomed: Ranks) -> None:
    doomed.run(_two_streams)


def _with_a_dying_peer(me: Rank, when: str) -> Any:
    comm = me.cache["comm"]
    comm.set_timeout(1.0)
    x = torch.ones(3 << 20, device=me.device)
    if when != "before":
        comm.all_reduce(x)
        comm.synchronize()
    if me.rank == 1:
        if when == "during":
            comm.all_reduce(x)
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    if when == "during":
        time.sleep(0.2)
    with pytest.raises(CommTimeoutError, match="for rank 1"):
        for _ in range(3):
            comm.all_reduce(x)
            comm.synchronize()
    elapsed = time.monotonic() - started
    assert torch.ones(8, device=me.device).sum().item() == 8
    comm.close()
    return elapsed


@pytest.mark.parametrize("when", ("before", "during", "after"))
def test_a_peer_dies(doomed: Ranks, when: str) -> None:
    survivor, victim = doomed.outcomes(_with_a_dying_peer, when)
    assert victim.killed
    assert not survivor.error, survivor.trace
    assert survivor.value < 10


def _cycles(me: Rank, cycles: int) -> int:
    before = 0
    for cycle in range(cycles):
        comm = CustomAllreduce(me.world, me.device)
        x = torch.ones(1000, device=me.device)
        assert torch.equal(comm.all_reduce(x), x * 2)
        comm.close()
        if cycle == 9:
            me.world.barrier()
            before = torch.cuda.mem_get_info(me.device)[0]
    me.world.barrier()
    return before - torch.cuda.mem_get_info(me.device)[0]


def test_open_and_close_leak_nothing(doomed: Ranks) -> None:
    assert all(lost < 32 << 20 for lost in doomed.run(_cycles, 200, deadline_s=120))
