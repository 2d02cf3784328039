"""One rank of scripts/bench_cpu, which starts it: times the systems, a line of JSON a cell.

RANK, WORLD_SIZE and MASTER_PORT (of a TCPStore of the launcher) say who it is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from communicators import CpuCommunicator, Group, Settings

OTHER_SIZES = [1 << shift for shift in (10, 14, 16, 18, 20, 22, 24, 26)]
ALL_REDUCE_SIZES = sorted([8, 64, 4 << 10, *OTHER_SIZES])
MAX_RESULT_BYTES = 128 << 20  # every rank holds one
ROUNDS = 21
ROUND_S = 0.01  # of one system in one round, about
OURS = "communicators"


class Systems:
    """The calls to compare: system -> function of no arguments, for one op and tensors."""

    def __init__(self, with_mpi: bool, threads: int, pin: bool) -> None:
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if pin:  # before anything opens, as an engine pins its workers
            cpus = sorted(os.sched_getaffinity(0))
            first, end = (len(cpus) * r // self.world_size for r in (self.rank, self.rank + 1))
            os.sched_setaffinity(0, cpus[first : max(end, first + 1)])
        torch.set_num_threads(threads)
        store = TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.world_size)
        group = Group(store, self.rank, self.world_size, settings=Settings())
        self.ours = CpuCommunicator(group, torch.device("cpu"))
        if self.ours.refusal is not None:
            raise SystemExit(f"the library refuses: {self.ours.refusal}")
        self.mpi: Any = None
        if with_mpi:
            from mpi4py import MPI

            self.mpi = MPI

    def calls(self, op: str, x: Any, out: Any) -> dict[str, Callable[[], Any]]:
        ours, root = self.ours, self.rank == 0
        if op == "all_reduce":
            calls = {OURS: lambda: ours.all_reduce_(x), "gloo": lambda: dist.all_reduce(x)}
        elif op == "all_gather":
            gathered = out
            gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            calls = {
                OURS: lambda: ours.run("all_gather", gathered, x),
                "gloo": lambda: gather_into(gathered, x),
            }
        elif op == "gather":
            parts = list(out.view(self.world_size, -1).unbind(0)) if root else None
            target = out if root else None
            calls = {
                OURS: lambda: ours.run("gather", target, x, 0),
                "gloo": lambda: dist.gather(x, parts, dst=0),
            }
        else:
            scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
            calls = {
                OURS: lambda: ours.run("reduce_scatter", out, x),
                "gloo": lambda: scatter(out, x),
            }
        mpi_call = self._mpi_call(op, x, out)
        if mpi_call is not None:
            calls["Open MPI"] = mpi_call
        return calls

    def _mpi_call(self, op: str, x: Any, out: Any) -> Callable[[], Any] | None:
        if self.mpi is None or x.dtype != torch.float32:  # MPI has no bfloat16
            return None
        mpi, comm = self.mpi, self.mpi.COMM_WORLD
        a, b = x.numpy(), out.numpy()
        if op == "all_reduce":
            return lambda: comm.Allreduce(mpi.IN_PLACE, a)
        if op == "all_gather":
            return lambda: comm.Allgather(a, b)
        if op == "gather":
            target = b if self.rank == 0 else None
            return lambda: comm.Gather(a, target, 0)
        return lambda: comm.Reduce_scatter_block(a, b)


def tensors(op: str, dtype: Any, nbytes: int, rank: int, world_size: int) -> tuple[Any, Any]:
    """(x, out): `nbytes` of one rank's contribution in ordinary memory, and room for results."""
    n = max(nbytes // torch.empty((), dtype=dtype).element_size(), 1)
    many = n * world_size
    x = torch.empty(many if op == "reduce_scatter" else n, dtype=dtype).fill_(float(rank + 1))
    out = torch.empty(many if op in ("all_gather", "gather") else n, dtype=dtype).fill_(-1.0)
    return x, out


def expected(op: str, x: Any, out: Any, rank: int, world_size: int) -> Any:
    total = float(world_size * (world_size + 1) // 2)
    if op == "all_reduce":
        return torch.full_like(x, total)
    if op == "reduce_scatter":
        return torch.full_like(out, total)
    if op == "gather" and rank != 0:
        return torch.full_like(out, -1.0)
    return torch.arange(1.0, world_size + 1).repeat_interleave(x.numel()).to(x.dtype)


def spend(us: float) -> None:
    """Other work between two calls."""
    ends = time.perf_counter() + us * 1e-6
    while time.perf_counter() < ends:
        pass


def seconds_of(call: Callable[[], Any], count: int, work_us: float) -> float:
    """Of one call: on average back to back, the median with other work before each."""
    if not work_us:
        started = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - started) / count
    took = []
    for _ in range(count):
        spend(work_us)
        started = time.perf_counter()
        call()
        took.append(time.perf_counter() - started)
    return statistics.median(took)


def measure(
    systems: Systems, op: str, dtype: Any, nbytes: int, work_us: float
) -> dict[str, list[float]]:
    """Microseconds a call, for each system and round, of this rank."""
    rank, world_size = systems.rank, systems.world_size
    barrier = systems.ours.barrier
    counts: dict[str, int] = {}
    x, out = tensors(op, dtype, nbytes, rank, world_size)
    calls = systems.calls(op, x, out)
    for name, call in calls.items():
        x.fill_(float(rank + 1))
        out.fill_(-1.0)
        call()
        result = x if op == "all_reduce" else out
        if not result.equal(expected(op, x, out, rank, world_size)):
            raise SystemExit(f"{name}: {op} of {nbytes} bytes of {dtype} is wrong on rank {rank}")
    x.zero_()  # sums of zeros stay finite however often they are made
    for name, call in calls.items():
        barrier()
        started = time.perf_counter()
        for _ in range(3):
            call()
        one = (time.perf_counter() - started) / 3
        counts[name] = int(max(2, min(2000, ROUND_S / (one + work_us * 1e-6))))
    chosen = systems.ours.group.gather_objects("counts", counts)[0]  # the same on all ranks
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            barrier()
            times[name].append(seconds_of(call, chosen[name], work_us) * 1e6)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", nargs="+", required=True)
    parser.add_argument("--dtypes", nargs="+", required=True)
    parser.add_argument("--sizes", type=int, nargs="+")
    parser.add_argument("--with-mpi", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pin", action="store_true")
    parser.add_argument("--work-us", type=float, default=0.0)
    options = parser.parse_args()
    systems = Systems(options.with_mpi, options.threads, options.pin)
    group = systems.ours.group
    for op in options.ops:
        for dtype_name in options.dtypes if op == "all_reduce" else options.dtypes[:1]:
            sizes = ALL_REDUCE_SIZES if op == "all_reduce" else OTHER_SIZES
            for nbytes in options.sizes or sizes:
                if op != "all_reduce" and nbytes * systems.world_size > MAX_RESULT_BYTES:
                    continue
                mine = measure(systems, op, getattr(torch, dtype_name), nbytes, options.work_us)
                every = group.gather_objects("times", mine)
                rounds = {
                    name: [max(us) for us in zip(*(t[name] for t in every), strict=True)]
                    for name in mine
                }
                row = {
                    "op": op,
                    "dtype": dtype_name,
                    "ranks": systems.world_size,
                    "bytes": nbytes,
                    "us": {name: statistics.median(us) for name, us in rounds.items()},
                    "least_us": {name: min(us) for name, us in rounds.items()},
                }
                if systems.rank == 0:
                    print(json.dumps(row), flush=True)
    systems.ours.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
