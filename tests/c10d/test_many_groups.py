"""Many groups of one job: open at once, and one after the other; and torch's entry point."""

from __future__ import annotations

import os
import resource
import threading
from importlib import metadata
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import communicators.c10d
from tests.ranks import Rank, run_fresh

#: Opened and closed one after the other. A tenth of what is asked for by hand:
#: COMMUNICATORS_TEST_GROUPS=1000.
ONE_BY_ONE = int(os.environ.get("COMMUNICATORS_TEST_GROUPS", "100"))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def many(rank: Rank, path: str) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    dist.init_process_group(
        communicators.c10d.BACKEND, init_method=f"file://{path}", rank=rank.rank, world_size=2
    )
    before, threads = descriptors(), threading.active_count()
    members = [[0, 1], [1, 0]]
    groups = [dist.new_group(members[i % 2], backend="communicators") for i in range(64)]
    for number, group in enumerate(groups):
        x = torch.full((3,), float(number))
        dist.all_reduce(x, group=group)
        assert (x == 2 * number).all()
    for number in range(64):  # not in the order in which they were made
        dist.destroy_process_group(groups[number * 7 % 64])
    assert descriptors() <= before and threading.active_count() <= threads
    memory = resident_mb()
    for number in range(ONE_BY_ONE):
        group = dist.new_group([0, 1], backend="communicators")
        x = torch.full((3,), float(number))
        work = dist.all_reduce(x, group=group, async_op=True)
        assert work is not None
        work.wait()
        assert (x == 2 * number).all()
        dist.destroy_process_group(group)
    assert descriptors() <= before and threading.active_count() <= threads
    assert resident_mb() < memory + 8 + ONE_BY_ONE / 50
    dist.destroy_process_group()


def test_64_groups_at_once_and_many_one_by_one(tmp_path: Path) -> None:
    left = set(os.listdir("/dev/shm"))
    for outcome in run_fresh(2, many, str(tmp_path / "store")):
        assert not outcome.error and not outcome.killed, outcome
    new = {name for name in os.listdir("/dev/shm") if name.startswith("communicators")}
    assert new <= left


def test_torch_finds_the_backend_by_its_entry_point() -> None:
    """As torch 2.14 looks it up: a callable that registers, as often as it is called."""
    found = [
        one
        for one in metadata.entry_points(group="torch.distributed.backends")
        if one.name == communicators.c10d.BACKEND
    ]
    if not found:
        pytest.skip("the package is not installed here")
    registrar = found[0].load()
    assert registrar is communicators.c10d.register
    registrar()
    assert communicators.c10d.BACKEND in dist.Backend.backend_list
