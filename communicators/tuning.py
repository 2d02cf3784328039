"""Measures every live communicator of a dispatcher, and turns the times into table rows.

Each result is checked before it is timed: an exact communicator against the rank-ordered fp32 sum,
bit for bit, another one within the rounding of its own sums. The time of a cell is the slowest
rank's median. Ranks decide on the gathered times, so all of them write the same table.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from .base import Communicator, Request, dtype_name
from .dispatcher import Dispatcher
from .errors import CommunicatorError
from .tables import Row

TUNED_OPS = ("all_reduce", "all_gather", "reduce_scatter")
_GRAPH_CALLS = 20
_SAMPLES = 11


@dataclass(frozen=True)
class Cell:
    """One measurement: the times in us of the communicators that ran, why the others did not."""

    request: Request
    us: dict[str, float]
    failed: dict[str, str]


def measure(
    dispatcher: Dispatcher,
    ops: Sequence[str],
    dtypes: Sequence[torch.dtype],
    sizes: Sequence[int],
    modes: Sequence[str],
) -> Iterator[Cell]:
    """Measures each op x dtype x size x mode. Collective; yields the same cells on all ranks.

    Args:
        sizes: bytes that one rank contributes, multiples of 16 times the world size.
        modes: "eager", and "capture" for calls recorded in a CUDA graph.
    """
    for op in ops:
        for dtype in dtypes:
            for mode in modes:
                for nbytes in sizes:
                    yield _cell(dispatcher, Request(op, dtype, nbytes, mode))


def rows(cells: Sequence[Cell]) -> list[Row]:
    """Table rows from cells in ascending size; neighbours with one winner become one row."""
    found: list[Row] = []
    for cell in cells:
        if not cell.us:
            continue
        request = cell.request
        winner = min(cell.us, key=lambda name: cell.us[name])
        row = Row(
            request.op, dtype_name(request.dtype), request.mode, request.nbytes, winner, cell.us
        )
        last = found[-1] if found else None
        same = last is not None and (last.op, last.dtype, last.mode, last.communicator) == (
            row.op, row.dtype, row.mode, row.communicator
        )  # fmt: skip
        if same:
            found.pop()
        found.append(row)
    return found


def _cell(dispatcher: Dispatcher, request: Request) -> Cell:
    us: dict[str, float] = {}
    failed: dict[str, str] = {}
    for communicator in dispatcher.live:
        assert communicator.capabilities is not None
        refusal = communicator.capabilities.refuses(request)
        if refusal is not None:
            failed[communicator.name] = str(refusal)
            continue
        problem, mine = _try(dispatcher, communicator, request)
        answers = dispatcher.group.gather_objects(f"tune {request}", (problem, mine))
        problems = [f"rank {r}: {p}" for r, (p, _) in enumerate(answers) if p]
        if problems:
            failed[communicator.name] = problems[0]
        else:
            us[communicator.name] = round(max(t for _, t in answers), 3)
    return Cell(request, us, failed)


def _try(dispatcher: Dispatcher, communicator: Communicator, request: Request) -> tuple[str, float]:
    """(what is wrong or "", us a call) on this rank."""
    try:
        call, out, expected = _prepare(dispatcher, communicator, request)
        call()
        _synchronize(dispatcher.device)
        wrong = _compare(out, expected, communicator, dispatcher.group.world_size)
        if wrong:
            return wrong, 0.0
        if request.mode == "capture":
            return "", _time_graph(dispatcher, communicator, call)
        return "", _time_eager(dispatcher, call)
    except CommunicatorError as error:
        return str(error), 0.0


def _prepare(
    dispatcher: Dispatcher, communicator: Communicator, request: Request
) -> tuple[Callable[[], None], torch.Tensor, torch.Tensor]:
    """The call, its poisoned output, and what must stand there afterwards."""
    group, device = dispatcher.group, dispatcher.device
    count = request.nbytes // request.dtype.itemsize
    whole = count * group.world_size if request.op == "reduce_scatter" else count
    inputs = []
    for rank in range(group.world_size):  # every rank makes every rank's input
        generator = torch.Generator(device).manual_seed(rank * 1000 + request.nbytes % 997)
        random = torch.randn(whole, generator=generator, device=device)
        inputs.append(random.to(request.dtype))
    if request.op == "all_gather":
        expected = torch.cat(inputs)
    else:
        total = torch.zeros(whole, dtype=torch.float32, device=device)
        for one in inputs:
            total += one.float()
        expected = total.to(request.dtype)
        if request.op == "reduce_scatter":
            expected = expected.view(group.world_size, -1)[group.rank]
    mine = inputs[group.rank]
    out = torch.full_like(expected, float("nan"))
    op = request.op
    return lambda: communicator.run(op, out, mine), out, expected


def _compare(
    out: torch.Tensor, expected: torch.Tensor, communicator: Communicator, world_size: int
) -> str:
    assert communicator.capabilities is not None
    if communicator.capabilities.deterministic:
        return "" if torch.equal(out, expected) else "its result is not the rank-ordered fp32 sum"
    # Each of W-1 additions may round in the tensor's own dtype.
    step = torch.finfo(expected.dtype).eps * world_size
    right = torch.allclose(out.float(), expected.float(), rtol=step, atol=step * world_size)
    return "" if right else "its result is wrong"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _time_eager(dispatcher: Dispatcher, call: Callable[[], None]) -> float:
    """us a call, the median of several batches of back-to-back calls."""
    batch = 1
    samples: list[float] = []
    for index in range(_SAMPLES + 1):
        dispatcher.group.barrier()
        _synchronize(dispatcher.device)
        started = time.perf_counter()
        for _ in range(batch):
            call()
        _synchronize(dispatcher.device)
        elapsed = (time.perf_counter() - started) * 1e6 / batch
        if index == 0:  # a first look, which decides how many calls make about 5 ms
            slowest = max(dispatcher.group.gather_objects("batch", elapsed))
            batch = int(min(max(5000 / slowest, 1), 500))
        else:
            samples.append(elapsed)
    return statistics.median(samples)


def _time_graph(
    dispatcher: Dispatcher, communicator: Communicator, call: Callable[[], None]
) -> float:
    """us a call inside a CUDA graph of back-to-back calls."""
    stream = torch.cuda.Stream(dispatcher.device)
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    _synchronize(dispatcher.device)
    graph = torch.cuda.CUDAGraph()
    with communicator.capture(), torch.cuda.graph(graph, stream=stream):
        for _ in range(_GRAPH_CALLS):
            call()
    samples = []
    for _ in range(_SAMPLES):
        dispatcher.group.barrier()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        _synchronize(dispatcher.device)
        samples.append(begin.elapsed_time(end) * 1e3 / _GRAPH_CALLS)
    return statistics.median(samples)
