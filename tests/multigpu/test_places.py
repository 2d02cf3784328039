"""Where the ranks are: four on two GPUs (or on four), GPUs by UUID, ranks that see one GPU each.

And a peer whose memory must not be mapped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from communicators.backends.custom_all_reduce import CustomAllreduce
from communicators.bindings.workspace import SharedBuffer
from communicators.peer_access.topology import Unknown, Verdict, probe_gpus
from tests.multigpu import test_custom_all_reduce as two
from tests.ranks import Rank, Ranks

pytestmark = [
    pytest.mark.multigpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA GPUs"),
]


# Four processes on two GPUs. Their kernels take turns on a GPU, so every wait on a peer of the same
# GPU lasts until the driver switches. topology refuses that; the test overrules it.


def _open_shared(me: Rank) -> None:
    verdict = Verdict(me.world_size, None, None, None, None)
    comm = CustomAllreduce(me.world, me.device, verdict=verdict)
    assert not comm.disabled, comm.refusal
    comm.set_timeout(30)
    me.cache["comm"] = comm


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    made = Ranks(4, gpus=True)
    made.run(_open_shared, deadline_s=120)
    yield made
    made.run(two._close)
    made.kill()


def _refused(me: Rank) -> str:
    comm = CustomAllreduce(me.world, me.device)
    assert comm.refusal is not None
    comm.close()
    return str(comm.refusal)


@pytest.mark.skipif(torch.cuda.device_count() >= 4, reason="four GPUs: each rank has its own")
def test_two_ranks_of_one_gpu_are_a_refusal(four: Ranks) -> None:
    reasons = four.run(_refused)
    assert len(set(reasons)) == 1
    assert "rank 0 and 2 are both on" in reasons[0]


@pytest.mark.parametrize("algorithm", (0, 1, 3))
def test_sums_of_four(four: Ranks, algorithm: int) -> None:
    four.run(two._sums, algorithm, deadline_s=120)


def test_every_bit_pattern_of_four(four: Ranks) -> None:
    four.run(two._special, 0)


def test_gather_and_scatter_of_four(four: Ranks) -> None:
    four.run(two._gather_and_scatter)


@pytest.mark.parametrize("count", (512, 9 << 20))
def test_graphs_of_four(four: Ranks, count: int) -> None:
    four.run(two._graph, 0, count)


def test_four_ranks_drift_apart(four: Ranks) -> None:
    four.run(two._skewed)


# How the GPUs are named.


def _uuids() -> list[str]:
    gpus = probe_gpus()
    assert not isinstance(gpus, Unknown)
    return [gpu.uuid for gpu in gpus[:2]]


def _reduce(me: Rank) -> str:
    comm = CustomAllreduce(me.world, me.device)
    if comm.refusal is not None:
        return str(comm.refusal)
    x = torch.full((5000,), me.rank + 1.0, device=me.device)
    assert torch.equal(comm.all_reduce(x), torch.full_like(x, 3.0))
    comm.close()
    return ""


def test_gpus_by_uuid_in_another_order() -> None:
    ranks = Ranks(
        2, gpus=True, environments=[{"CUDA_VISIBLE_DEVICES": ",".join(reversed(_uuids()))}] * 2
    )
    assert ranks.run(_reduce, deadline_s=45) == ["", ""]
    ranks.kill()


@pytest.mark.parametrize("by", ("uuid", "index"))
def test_ranks_that_see_one_gpu_each(by: str) -> None:
    names = _uuids() if by == "uuid" else ["0", "1"]
    ranks = Ranks(2, gpus=True, environments=[{"CUDA_VISIBLE_DEVICES": name} for name in names])
    assert ranks.run(_reduce, deadline_s=45) == ["", ""]
    ranks.kill()


# A peer whose memory may not be mapped: what the driver is asked for is spoilt on one rank.


def _without_permission(me: Rank) -> str:
    original: Any = SharedBuffer.map_peers
    if me.rank == 1:

        def spoilt(buffer: SharedBuffer, handles: list[bytes], own: int = 0) -> None:
            original(buffer, [bytes(64) for _ in handles], own)

        SharedBuffer.map_peers = spoilt  # type: ignore[method-assign, assignment]
    comm = CustomAllreduce(me.world, me.device)
    assert comm.disabled
    comm.close()
    assert torch.ones(8, device=me.device).sum().item() == 8  # the context is not poisoned
    return str(comm.refusal)


def test_memory_that_cannot_be_mapped_is_a_refusal_on_all_ranks() -> None:
    ranks = Ranks(2, gpus=True)
    reasons = ranks.run(_without_permission, deadline_s=120)
    assert reasons[0] == reasons[1]
    assert "rank 1" in reasons[0] and "cannot map the memory of rank 0" in reasons[0]
    ranks.kill()
