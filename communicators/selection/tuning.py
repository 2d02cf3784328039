"""Measures every live communicator of a dispatcher, and turns the times into table rows.

Each result is checked before it is timed: an exact communicator against the rank-ordered fp32 sum,
bit for bit, another one within the rounding of its own sums. timing.py says what a time is. Ranks
decide on gathered times and findings, so all of them write the same table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..base import REDUCTIONS, Communicator, Request, dtype_name
from ..errors import CommunicatorError
from .dispatcher import Dispatcher
from .policy import preferred
from .tables import Row
from .timing import Timer

TUNED_OPS = ("all_reduce", "all_gather", "reduce_scatter")


@dataclass(frozen=True)
class Cell:
    """One measurement: the times in us of the communicators that ran, in order of preference, and
    why the others did not."""

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
        dtypes: of the reductions; the other ops move bytes and are measured with the first one.
        sizes: bytes that one rank contributes, multiples of 16 times the world size.
        modes: "eager", and "capture" for calls recorded in a CUDA graph.
    """
    tiny = torch.ones(8, device=dispatcher.device)
    timer = Timer(
        dispatcher.group, dispatcher.device, lambda: dispatcher.run("all_reduce", tiny, tiny)
    )
    for op in ops:
        for dtype in dtypes if op in REDUCTIONS else dtypes[:1]:
            for mode in modes:
                for nbytes in sizes:
                    yield _cell(dispatcher, timer, Request(op, dtype, nbytes, mode))


def rows(cells: Sequence[Cell]) -> list[Row]:
    """Table rows from cells: one for each that somebody ran, with the times of all who did."""
    return [
        Row(
            cell.request.op,
            dtype_name(cell.request.dtype),
            cell.request.mode,
            cell.request.nbytes,
            preferred(cell.us, cell.us),
            cell.us,
        )
        for cell in cells
        if cell.us
    ]


def _cell(dispatcher: Dispatcher, timer: Timer, request: Request) -> Cell:
    us: dict[str, float] = {}
    failed: dict[str, str] = {}
    for communicator in dispatcher.live:
        assert communicator.capabilities is not None
        refusal = communicator.capabilities.refuses(request)
        if refusal is not None:
            failed[communicator.name] = str(refusal)
            continue
        call, problem = _checked(dispatcher, communicator, request)
        problem = _agreed(dispatcher, f"checked {request}", problem)
        if not problem:
            try:
                time = _time(timer, communicator, call, request)
            except CommunicatorError as error:
                problem = str(error)
            problem = _agreed(dispatcher, f"timed {request}", problem)
        if problem:
            failed[communicator.name] = problem
        else:
            us[communicator.name] = round(time, 3)
    return Cell(request, us, failed)


def _agreed(dispatcher: Dispatcher, step: str, problem: str) -> str:
    """The first rank's problem that has one, on all ranks: they go on together or not at all."""
    answers = dispatcher.group.gather_objects(step, problem)
    return next((f"rank {rank}: {one}" for rank, one in enumerate(answers) if one), "")


def _checked(
    dispatcher: Dispatcher, communicator: Communicator, request: Request
) -> tuple[Callable[[], None], str]:
    """The call, made once, and what is wrong with its result or ""."""
    call, out, expected = _prepare(dispatcher, communicator, request)
    try:
        call()
        if dispatcher.device.type == "cuda":
            torch.cuda.synchronize(dispatcher.device)
    except CommunicatorError as error:
        return call, str(error)
    return call, _compare(out, expected, communicator, dispatcher.group.world_size)


def _time(
    timer: Timer, communicator: Communicator, call: Callable[[], None], request: Request
) -> float:
    if request.mode == "capture":
        return timer.graph_us(call, request.nbytes, scope=communicator.capture())
    return timer.eager_us(call)


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
