"""All-reduce on the GPUs of this machine: ours, NCCL and torch's symmetric memory, side by side.

For every size each implementation is first checked, eager and from a graph, on fresh random data
with a poisoned output. Then it is timed: back to back in a CUDA graph, after a kernel that writes
its input, and eager from Python. Times in us a call; busbw is nccl-tests': algbw * 2 (W-1) / W.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ...errors import TopologyError
from . import launch
from .record import Row

if TYPE_CHECKING:
    from ...selection.timing import Timer

SIZES = [n << 10 for n in (1, 16, 64, 256)] + [n << 20 for n in (1, 4, 8, 16, 32, 64, 256)]
OURS = ("CustomAllreduce", "GroupCoordinator")

#: For a tensor to read: the call, on the current stream, the tensor that it reads, and the one that
#: it writes.
Make = Callable[[Any], tuple[Callable[[], object], Any, Any]]


def rows(options: argparse.Namespace, world_size: int) -> Iterator[Row]:
    """Starts the ranks and measures."""
    require(world_size)
    # NCCL at its best in graphs.
    environment = {"NCCL_GRAPH_MIXING_SUPPORT": "0", "OMP_NUM_THREADS": "1"}
    total = 3 * len(options.dtypes) * len(options.sizes or SIZES)
    return launch.measured(__name__, world_size, options, total=total, environment=environment)


def require(world_size: int) -> None:
    """TopologyError where there are not enough GPUs for the ranks."""
    count = gpus()
    if not 2 <= world_size <= count:
        raise TopologyError(
            f"an all-reduce between GPUs needs two or more, one a rank; got {world_size} ranks, "
            f"and torch sees {count} GPUs"
        )


def gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """One rank."""
    import torch
    import torch.distributed as dist

    from ...backends.custom_all_reduce import CustomAllreduce
    from ...groups.coordinator import GroupCoordinator
    from ...groups.group import Group
    from ...selection.timing import Timer

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    group = Group.of(dist.new_group(backend="gloo"))
    ours = CustomAllreduce(group, device)
    tiny = torch.ones(8, device=device)
    # Ours leaves the GPUs closer to each other than NCCL's would.
    barrier = (lambda: dist.all_reduce(tiny)) if ours.disabled else (lambda: ours.all_reduce(tiny))
    timer = Timer(group, device, barrier)
    coordinator = GroupCoordinator(list(range(group.world_size)), device, "bench")
    if ours.disabled and group.rank == 0:
        print(f"CustomAllreduce is left out: {ours.refusal}", flush=True)
    makers = {
        name: make
        for name, make in _implementations(ours, coordinator).items()
        if options.only in name
    }
    for dtype in options.dtypes:
        for nbytes in options.sizes or SIZES:
            found = {
                name: _cell(timer, make, nbytes, getattr(torch, dtype))
                for name, make in makers.items()
            }
            notes = {name: cell for name, cell in found.items() if isinstance(cell, str)}
            if "CustomAllreduce" in found:
                notes["algorithm"] = ours.algorithm(nbytes)
            key = {"op": "all_reduce", "dtype": dtype, "ranks": group.world_size, "bytes": nbytes}
            for timed in ("graph", "after a producer", "eager"):
                values = {n: cell[timed] for n, cell in found.items() if isinstance(cell, dict)}
                yield Row({**key, "timed": timed}, values, notes=notes)
    coordinator.close()
    ours.close()
    dist.destroy_process_group()


def _implementations(ours: Any, coordinator: Any) -> dict[str, Make]:
    import torch

    from . import peers

    def custom(x: Any) -> tuple[Callable[[], object], Any, Any]:
        out = torch.empty_like(x)
        return lambda: ours.all_reduce(x, out=out), x, out

    def coordinated(x: Any) -> tuple[Callable[[], object], Any, Any]:
        return lambda: coordinator.all_reduce_(x), x, x

    found: dict[str, Make] = {} if ours.disabled else {"CustomAllreduce": custom}
    return {
        **found,
        "GroupCoordinator": coordinated,
        "NCCL": peers.nccl,
        "torch symm_mem two-shot": peers.symmetric_memory,
    }


def _cell(timer: Timer, make: Make, nbytes: int, dtype: Any) -> dict[str, float] | str:
    """Checks, then times one implementation at one size; or what is wrong with it. Collective."""
    import torch

    count = nbytes // dtype.itemsize
    x = torch.empty(count, dtype=dtype, device=timer.device)
    source = torch.randn(count, device=timer.device).to(dtype)
    made, problem = None, ""
    try:
        made = make(x)
    except RuntimeError as error:  # of torch's, where these GPUs share no memory
        problem = str(error).strip().partition("\n")[0] or type(error).__name__
    problems = timer.group.gather_objects("made", problem)
    if made is not None and not any(problems):
        problems = timer.group.gather_objects("checked", _check(timer, *made))
    if made is None or any(problems):
        return next(p for p in problems if p)
    call, target, _ = made
    after = timer.after_producer_us
    return {
        "graph": round(timer.graph_us(call, nbytes), 3),
        "after a producer": round(after(call, lambda: target.copy_(source), nbytes), 3),
        "eager": round(timer.eager_us(call), 3),
    }


def _check(timer: Timer, call: Callable[[], object], target: Any, out: Any) -> str:
    """ "" when eager and graph results are right on fresh data."""
    import torch

    world_size = timer.group.world_size
    graph = None
    for turn in range(3):
        inputs = []
        for rank in range(world_size):
            generator = torch.Generator(timer.device).manual_seed(turn * 64 + rank)
            random = torch.randn(target.numel(), generator=generator, device=timer.device)
            inputs.append(random.to(target.dtype))
        expected = torch.stack([one.float() for one in inputs]).sum(0)
        if graph is None:
            graph = timer.capture(call, 1)
        if out is not target:
            out.fill_(float("nan"))
        target.copy_(inputs[timer.group.rank])
        torch.cuda.synchronize(timer.device)
        with torch.cuda.stream(timer.stream):
            call() if turn == 0 else graph.replay()
        torch.cuda.synchronize(timer.device)
        # One rounding to the tensor's dtype a sum, or two for those that round in between.
        step = torch.finfo(target.dtype).eps * world_size
        if not torch.allclose(out.float(), expected, rtol=step, atol=step):
            return f"wrong result, {'eager' if turn == 0 else 'from a graph'}"
    return ""
