"""Takes the opened communicators of a group, picks one for each request, runs it, and explains.

There is one ordered list of live communicators. It is what runs, what `explain()` prints and what
the policy chooses from, so what is printed is what runs.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..base import (
    OPS,
    REDUCTIONS,
    Capability,
    Communicator,
    Refusal,
    Request,
    Splits,
    dtype_name,
    size_name,
)
from ..errors import CommMismatchError, CommunicatorError, InvalidArgumentError
from ..groups import forks
from ..groups.arguments import check_reduced
from ..groups.group import Group
from .policy import MARGIN, Choice, choose
from .tables import EMPTY, Table

_MAX_PLANS = 4096  # choices remembered; a job has a few sizes, and a runaway must not grow for ever
_MAX_RECORDED = 4096  # entries for captures that nobody compares; the latest of them
#: Where what comes out is a part of what goes in.
_SCATTERED = ("reduce_scatter", "scatter")
_ALIGNED = 256  # explain() asks about sizes that no `multiple` of a communicator refuses


class Dispatcher:
    """The communicators of one group on one device, and the choice between them.

    Args:
        group: the ranks.
        device: where the tensors are.
        communicators: opened ones, live or refused, in order of preference.
        table: measured rows of this machine shape; must be the same on all ranks.

    Raises CommMismatchError when the ranks hold different tables or communicators. Collective.
    """

    def __init__(
        self,
        group: Group,
        device: torch.device,
        communicators: Sequence[Communicator],
        table: Table = EMPTY,
    ) -> None:
        self.group = group
        self.device = device
        self.table = table
        self.live = [c for c in communicators if c.refusal is None]
        self.refused: dict[str, Refusal] = {
            c.name: c.refusal for c in communicators if c.refusal is not None
        }
        self._plans: dict[tuple[str, torch.dtype, int, bool, bool, str], Communicator] = {}
        self._on_cuda = device.type == "cuda"
        self._debug = group.settings.debug
        #: (how many in a row, call) that CUDA graphs have recorded since they were last compared.
        self._recorded: deque[tuple[int, str]] = deque(maxlen=_MAX_RECORDED)
        forks.tell(self)
        facts = (table.digest, [c.name for c in self.live])
        for rank, theirs in enumerate(group.gather_objects("dispatcher", facts)):
            if theirs != facts:
                raise CommMismatchError(
                    f"rank {group.rank} dispatches with table {facts[0]} ({table.source}) over "
                    f"{facts[1]}, and rank {rank} with table {theirs[0]} over {theirs[1]}"
                )

    def select(self, request: Request) -> Choice:
        """What the policy picks for `request`, and why. Pure; the same on every rank."""
        live: list[tuple[str, Capability]] = [
            (c.name, c.capabilities) for c in self.live if c.capabilities is not None
        ]
        return choose(request, live, self.table)

    def run(
        self,
        op: str,
        out: torch.Tensor | None,
        inp: torch.Tensor | None,
        root: int = 0,
        exact: bool = False,
        by: str = "sum",
        splits: Splits | None = None,
    ) -> None:
        """Runs one collective on contiguous tensors; shapes as in base.OPS.

        Args:
            exact: by nobody who rounds on the way (Request.exact).
            by: of a reduction, one of base.BY.
            splits: of an all_to_all, elements to and from each rank.
        Raises CommunicatorError when nobody takes it, and whatever the communicator raises.
        """
        smaller = out if inp is None or op in _SCATTERED else inp
        assert smaller is not None
        # What one rank sends in an all_to_all the others do not know, so nothing is chosen by it.
        nbytes = smaller.nbytes if splits is None else 1
        if self._debug and op not in ("send", "recv"):
            self._compare(op, smaller, root, by, splits)
        capturing = self._on_cuda and torch.cuda.is_current_stream_capturing()
        key = (op, smaller.dtype, nbytes, capturing, exact, by)
        communicator = self._plans.get(key)
        if communicator is None:
            communicator = self._plan(key, smaller)
        if capturing and op not in ("send", "recv"):
            call = op if by == "sum" else f"{op} by {by}"
            self._record(f"{call} of {nbytes} bytes of {dtype_name(smaller.dtype)}")
        if by == "sum" and splits is None:
            communicator.run(op, out, inp, root)
        else:
            communicator.run(op, out, inp, root, by, splits)

    def _record(self, call: str) -> None:
        """Notes a call that a CUDA graph records; calls alike in a row become one entry."""
        alike = self._recorded[-1][0] if self._recorded and self._recorded[-1][1] == call else 0
        if alike:
            self._recorded.pop()
        self._recorded.append((alike + 1, call))

    def _compare_recorded(self) -> None:
        mine = list(self._recorded)
        self._recorded.clear()
        for rank, theirs in enumerate(self.group.gather_objects("captured", mine)):
            if theirs != mine:
                pairs = itertools.zip_longest(mine, theirs, fillvalue=(0, "no call"))
                (a, b), (c, d) = next(pair for pair in pairs if pair[0] != pair[1])
                raise CommMismatchError(
                    f"group {self.group.name}: the ranks captured different calls, rank "
                    f"{self.group.rank} {a} x {b} where rank {rank} captured {c} x {d}; replaying "
                    "these graphs would wait for calls that never come"
                )

    def _compare(
        self, op: str, tensor: torch.Tensor, root: int, by: str, splits: Splits | None
    ) -> None:
        """COMMUNICATORS_DEBUG: the ranks compare their calls on the host before they make them."""
        shape = list(tensor.shape) if splits is None else "parts"
        call = f"{op} of {shape} {dtype_name(tensor.dtype)}, root {root}"
        call += "" if by == "sum" else f", by {by}"
        for rank, theirs in enumerate(self.group.gather_objects("debug", call)):
            if theirs != call:
                raise CommMismatchError(
                    f"rank {self.group.rank} calls {call} and rank {rank} calls {theirs}"
                )

    def _plan(
        self, key: tuple[str, torch.dtype, int, bool, bool, str], tensor: torch.Tensor
    ) -> Communicator:
        self.group.require_own_process()
        if tensor.device.type != self.device.type:
            raise InvalidArgumentError(
                f"{key[0]}: the tensor is on {tensor.device}; rank {self.group.rank} of group "
                f"{self.group.name} works on {self.device}"
            )
        op, dtype, nbytes, capturing, exact, by = key
        request = Request(op, dtype, nbytes, "capture" if capturing else "eager", exact, by)
        self._require_dtype(op, dtype, by)
        if nbytes == 0:
            self._plans[key] = _NOTHING
            return _NOTHING
        choice = self.select(request)
        if choice.communicator is None:
            why = "; ".join(f"{name}: {refusal}" for name, refusal in choice.refused.items())
            raise CommunicatorError(
                f"no communicator takes {request} on rank {self.group.rank} ({why})"
            )
        if len(self._plans) >= _MAX_PLANS:
            self._plans.clear()
        communicator = next(c for c in self.live if c.name == choice.communicator)
        self._plans[key] = communicator
        return communicator

    def _require_dtype(self, op: str, dtype: torch.dtype, by: str) -> None:
        """InvalidArgumentError for a reduction of a dtype that no live communicator reduces."""
        if op not in REDUCTIONS:
            return
        known = [c.capabilities for c in self.live if c.capabilities is not None]
        sums = [one.dtypes for one in known if op in one.ops]
        if sums and None not in sums:
            summed = frozenset().union(*(dtypes for dtypes in sums if dtypes is not None))
            check_reduced(f"{self.group.name}.{op}", dtype, summed, self.group.rank, by=by)

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """A scope in which CUDA graphs may be captured; each live communicator prepares for it.

        At its end, if the captures succeeded, the ranks compare the calls that graphs have
        recorded, here or anywhere since the last time; CommMismatchError unless they are the same.
        Collective on GPUs.
        """
        try:
            with contextlib.ExitStack() as stack:
                for communicator in self.live:
                    stack.enter_context(communicator.capture())
                yield
        except BaseException:
            self._recorded.clear()  # a capture that failed is compared with nobody
            raise
        if self._on_cuda:
            self._compare_recorded()

    def explain(self, dtype: torch.dtype = torch.bfloat16) -> str:
        """What is used for which collective, by size, and why each other one is not."""
        lines = [
            f"group {self.group.name}: rank {self.group.rank} of {self.group.world_size}, "
            f"{self.device}, table: {self.table.source}"
        ]
        for mode in ("eager", "capture") if self._on_cuda else ("eager",):
            alike: dict[tuple[str, ...], list[str]] = {}
            for op in OPS:
                answer = tuple(self._answer(op, dtype, mode))
                alike.setdefault(answer, []).append(op)
            for answer, ops in alike.items():
                lines.append(f"  {', '.join(ops)}; {dtype_name(dtype)}, {mode}:")
                lines += answer
        lines += [f"  not opened: {name}: {why}" for name, why in self.refused.items()]
        return "\n".join(lines)

    def _answer(self, op: str, dtype: torch.dtype, mode: str) -> Iterator[str]:
        for low, high, first, last in self._ranges(op, dtype, mode):
            # What was measured at the largest size of a range is said of that size alone.
            also = f"; {first.quote}" if first.quote != last.quote else ""
            yield f"    {_span(low, high)}: {last.communicator or 'nothing'}, {last.reason}{also}"
            for name, why in last.refused.items():
                yield f"      not {name}: {why}"

    def _ranges(
        self, op: str, dtype: torch.dtype, mode: str
    ) -> list[tuple[int, int | None, Choice, Choice]]:
        """(above, up to, first and last choice) for all sizes that are answered alike.

        The answer can change at a measured size, where two measured times cross, or at a limit.
        """
        open_to = [c.capabilities for c in self.live if c.capabilities is not None]
        bounds = {capability.max_bytes for capability in open_to}
        bounds |= {capability.min_bytes - 1 for capability in open_to if capability.min_bytes > 1}
        bounds |= self.table.bounds(op, dtype, mode, MARGIN)
        ends = sorted(bound for bound in bounds if bound)
        found: list[tuple[int, int | None, Choice, Choice]] = []
        for low, high in zip([0, *ends], [*ends, None], strict=True):
            inside = high if high is not None else low + _ALIGNED
            aligned = inside // _ALIGNED * _ALIGNED
            choice = self.select(Request(op, dtype, aligned if aligned > low else inside, mode))
            if found and _same(found[-1][3], choice):
                found[-1] = (found[-1][0], high, found[-1][2], choice)
            else:
                found.append((low, high, choice, choice))
        return found

    def after_fork(self) -> None:
        """In a forked child: nothing is live, so the next call is planned anew, and refused."""
        self.live = []
        self._plans.clear()

    def close(self) -> None:
        """Closes every communicator; idempotent, no communication."""
        self._plans.clear()
        for communicator in self.live:
            communicator.close()


class _Nothing:
    """Takes what has no elements: nothing moves, on any rank."""

    def run(self, *_: Any) -> None:
        return


_NOTHING: Any = _Nothing()


def _same(a: Choice, b: Choice) -> bool:
    return a.communicator == b.communicator and set(a.refused) == set(b.refused)


def _span(low: int, high: int | None) -> str:
    if high is None:
        return f"above {size_name(low)}" if low else "any size"
    return f"{size_name(low)} to {size_name(high)}" if low else f"up to {size_name(high)}"


def table_directories(directory: str) -> list[Path]:
    """COMMUNICATORS_TABLE_DIR first when it is set, then the tables that ship."""
    shipped = Path(__file__).with_name("data")
    return [Path(directory), shipped] if directory else [shipped]
