"""CPU collectives through their public Python calls: this library beside gloo (and Open MPI).

The systems run in the same processes and take turns within every cell, so that what else the
machine does falls on all of them. Every result is compared with its reference before it is timed.
A cell is the median over the rounds of the slowest rank's time a call.

`bytes` is what one rank contributes. busbw is nccl-tests' (its page PERFORMANCE): the bytes
that must cross between ranks, by the time: all_reduce bytes * 2(W-1)/W, all_to_all half of that,
the others bytes * (W-1).
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ...errors import CommunicatorError, RefusedError
from . import launch
from .record import Row

OPS = ("all_reduce", "all_gather", "gather", "reduce_scatter", "all_to_all")
OURS = "communicators"
OTHER_SIZES = [1 << shift for shift in (10, 14, 16, 18, 20, 22, 24, 26)]
ALL_REDUCE_SIZES = sorted([8, 64, 4 << 10, *OTHER_SIZES])
MAX_RESULT_BYTES = 128 << 20  # every rank holds one
ROUNDS = 21
ROUND_S = 0.01  # of one system in one round, about


def cells(options: argparse.Namespace, world_size: int) -> list[tuple[str, str, int]]:
    """(op, dtype, bytes) of each row; a sum alone depends on the dtype."""
    return [
        (op, dtype, nbytes)
        for op in options.ops
        for dtype in (options.dtypes if op == "all_reduce" else options.dtypes[:1])
        for nbytes in options.sizes or (ALL_REDUCE_SIZES if op == "all_reduce" else OTHER_SIZES)
        if op == "all_reduce" or nbytes * world_size <= MAX_RESULT_BYTES
    ]


def rows(options: argparse.Namespace, world_size: int, prefix: Sequence[str] = ()) -> Iterator[Row]:
    """Starts the ranks and measures; options.peer is a module with one more peer."""
    total = len(cells(options, world_size))
    return launch.measured(__name__, world_size, options, total=total, prefix=prefix)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """One rank."""
    import torch
    import torch.distributed as dist

    from ...backends.cpu import CpuCommunicator
    from ...groups.group import Group

    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if options.pin:  # before anything opens, as an engine pins its workers
        cpus = sorted(os.sched_getaffinity(0))
        first, end = (len(cpus) * r // world_size for r in (rank, rank + 1))
        os.sched_setaffinity(0, cpus[first : max(end, first + 1)])
    torch.set_num_threads(options.threads)
    group = Group.of(None)
    ours = CpuCommunicator(group, torch.device("cpu"))
    if ours.refusal is not None:
        raise RefusedError(f"rank {rank}: the library refuses: {ours.refusal}")
    for op, dtype, nbytes in cells(options, world_size):
        mine = _rounds(ours, options, op, getattr(torch, dtype), nbytes)
        every = group.gather_objects("times", mine)
        slowest = {
            name: [max(us) for us in zip(*(t[name] for t in every), strict=True)] for name in mine
        }
        yield Row(
            {"op": op, "dtype": dtype, "ranks": world_size, "bytes": nbytes},
            {name: statistics.median(us) for name, us in slowest.items()},
            least={name: min(us) for name, us in slowest.items()},
        )
    ours.close()
    dist.destroy_process_group()


def _calls(ours: Any, peer: str | None, op: str, x: Any, out: Any) -> dict[str, Callable[[], Any]]:
    """The calls to compare, for one op and tensors: system -> function of no arguments."""
    from . import peers

    world = ours.group
    target = None if op == "gather" and world.rank != 0 else out
    splits = [x.numel() // world.world_size] * world.world_size
    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: ours.all_reduce_(x),
        "all_gather": lambda: ours.run("all_gather", out, x),
        "gather": lambda: ours.run("gather", target, x, 0),
        "reduce_scatter": lambda: ours.run("reduce_scatter", out, x),
        "all_to_all": lambda: ours.run("all_to_all", out, x, 0, "sum", (splits, splits)),
    }
    found = {OURS: calls[op], "gloo": peers.gloo(op, x, out)}
    return {**found, **importlib.import_module(peer).calls(op, x, out)} if peer else found


def _tensors(op: str, dtype: Any, nbytes: int, rank: int, world_size: int) -> tuple[Any, Any]:
    """(x, out): `nbytes` of one rank's contribution in ordinary memory, and room for results."""
    import torch

    n = max(nbytes // dtype.itemsize, 1)
    if op == "all_to_all":
        n = -(-n // world_size) * world_size
    many = n * world_size
    x = torch.empty(many if op == "reduce_scatter" else n, dtype=dtype).fill_(float(rank + 1))
    out = torch.empty(many if op in ("all_gather", "gather") else n, dtype=dtype).fill_(-1.0)
    return x, out


def _expected(op: str, x: Any, out: Any, rank: int, world_size: int) -> Any:
    import torch

    total = float(world_size * (world_size + 1) // 2)
    if op == "all_reduce":
        return torch.full_like(x, total)
    if op == "reduce_scatter":
        return torch.full_like(out, total)
    if op == "gather" and rank != 0:
        return torch.full_like(out, -1.0)
    each = out.numel() // world_size
    return torch.arange(1.0, world_size + 1).repeat_interleave(each).to(x.dtype)


def _spend(us: float) -> None:
    """Other work between two calls."""
    ends = time.perf_counter() + us * 1e-6
    while time.perf_counter() < ends:
        pass


def _seconds_of(call: Callable[[], Any], count: int, work_us: float) -> float:
    """Of one call: on average back to back, the median with other work before each."""
    if not work_us:
        started = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - started) / count
    took = []
    for _ in range(count):
        _spend(work_us)
        started = time.perf_counter()
        call()
        took.append(time.perf_counter() - started)
    return statistics.median(took)


def _rounds(
    ours: Any, options: argparse.Namespace, op: str, dtype: Any, nbytes: int
) -> dict[str, list[float]]:
    """Microseconds a call, for each system and round, of this rank."""
    rank, world_size, work_us = ours.group.rank, ours.group.world_size, options.work_us
    counts: dict[str, int] = {}
    x, out = _tensors(op, dtype, nbytes, rank, world_size)
    calls = _calls(ours, options.peer, op, x, out)
    for name, call in calls.items():
        x.fill_(float(rank + 1))
        out.fill_(-1.0)
        call()
        result = x if op == "all_reduce" else out
        if not result.equal(_expected(op, x, out, rank, world_size)):
            raise CommunicatorError(
                f"{name}: {op} of {nbytes} bytes of {dtype} is wrong on rank {rank}"
            )
    x.zero_()  # sums of zeros stay finite however often they are made
    for name, call in calls.items():
        ours.barrier()
        started = time.perf_counter()
        for _ in range(3):
            call()
        one = (time.perf_counter() - started) / 3
        counts[name] = int(max(2, min(2000, ROUND_S / (one + work_us * 1e-6))))
    chosen = ours.group.gather_objects("counts", counts)[0]  # the same on all ranks
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            ours.barrier()
            times[name].append(_seconds_of(call, chosen[name], work_us) * 1e6)
    return times
