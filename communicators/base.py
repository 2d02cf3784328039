"""The ideas that everything else is made of: Request, Refusal, Capability, Communicator.

A *communicator* is one way of moving tensors between the ranks of a group: NVLink kernels, NCCL,
CPU shared memory, a vendor's torch.distributed backend. Each is one small class with five verbs:

    capability()      may this rank take part, and in what?      local, no communication
    allocate()        take this rank's resources, return a handle for the peers    local
    rendezvous(all)   map what the peers allocated               local, given everyone's handles
    run(op, out, inp) do it
    close()           give everything back; idempotent, never communicates

The constructor calls the first three with an agreement of the whole group between them, so either
every rank holds a live communicator or every rank holds the same Refusal, and no rank waits for one
that gave up. The dispatcher (dispatcher.py) holds the live communicators of a group in order of
preference and picks one for each request.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .errors import CommunicatorError, RefusedError
from .groups import forks
from .settings import Settings

if TYPE_CHECKING:
    from .groups.group import Group

#: The collectives, by their field's names. `inp` and `out` are contiguous; n is inp.numel():
#:   all_reduce       inp [n]      out [n], may be inp       sum over the ranks
#:   all_gather       inp [n]      out [W*n]                 rank-ordered concatenation
#:   reduce_scatter   inp [W*m]    out [m]                   part `rank` of the sum
#:   gather           inp [n]      out [W*n] on root, else None
#:   broadcast        inp is out [n]                         root's content everywhere
#:   send, recv       inp [n] / out [n]                      root is the peer
#:   reduce           inp [n]      out [n] on root, else None
#:   scatter          inp [W*n] on root, else None, out [n]  part `rank` of the root's
#:   all_to_all       inp [n]      out [m]                   parts by `splits`
OPS = (
    "all_reduce", "all_gather", "reduce_scatter", "gather", "broadcast", "send", "recv",
    "reduce", "scatter", "all_to_all",
)  # fmt: skip
#: Those that reduce; the others move bytes, and what the bytes are makes no difference to them.
REDUCTIONS = ("all_reduce", "reduce_scatter", "reduce")
#: What they reduce by, in the order of the numbers of torch's ReduceOp. Bits are those of integers
#: and of bool, of which there is neither a sum nor an average.
BY = ("sum", "avg", "product", "min", "max", "band", "bor", "bxor")
BITS = frozenset({"band", "bor", "bxor"})
#: Of an all_to_all: elements that go to each rank, and that come from each.
Splits = tuple[Sequence[int], Sequence[int]]

#: How a request is issued: by the host now, or recorded in a CUDA graph.
MODES = ("eager", "capture")


@dataclass(frozen=True)
class Request:
    """What a dispatcher selects on: only facts that are equal on all ranks.

    Contiguity, alignment or addresses can differ between ranks, so they never pick a communicator;
    a tensor that does not fit is staged.
    """

    op: str
    dtype: torch.dtype
    nbytes: int  # of the smaller side: what one rank contributes, or gets of a scattered whole
    mode: str = "eager"
    exact: bool = False  # nobody who rounds on the way, whatever the user allows in general
    by: str = "sum"  # of a reduction: one of BY

    def __str__(self) -> str:
        exact = ", exact" if self.exact else ""
        op = self.op if self.by == "sum" else f"{self.op} by {self.by}"
        return f"{op} of {self.nbytes} bytes of {dtype_name(self.dtype)}, {self.mode}{exact}"


@dataclass(frozen=True)
class Refusal:
    """Why something is not used. A value, never an exception: it can be compared and printed."""

    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class Capability:
    """What a communicator may be asked for: admission, not preference (that is a measured row)."""

    ops: frozenset[str]
    dtypes: frozenset[torch.dtype] | None = None  # of the reductions; None: any
    by: frozenset[str] = frozenset({"sum"})
    modes: frozenset[str] = frozenset({"eager"})
    max_bytes: int | None = None
    min_bytes: int = 0
    multiple: int = 1  # the byte count must be a multiple of this
    deterministic: bool = True  # rank-ordered fp32 sums: the same bits on every rank, always
    #: How values lose bits on the way; empty: they travel whole.
    rounds: str = field(default="", compare=False)

    def refuses(self, request: Request) -> Refusal | None:
        """Why `request` is not admitted, or None when it is."""
        if request.op not in self.ops:
            return Refusal(f"it does only {', '.join(sorted(self.ops))}")
        if request.mode not in self.modes:
            return Refusal(f"it does not run in mode {request.mode!r}")
        if (
            request.op in REDUCTIONS
            and self.dtypes is not None
            and request.dtype not in self.dtypes
        ):
            names = ", ".join(sorted(dtype_name(dtype) for dtype in self.dtypes))
            return Refusal(f"it sums {names}, not {dtype_name(request.dtype)}")
        if request.op in REDUCTIONS and request.by not in self.by:
            return Refusal(f"it reduces by {', '.join(sorted(self.by))}, not by {request.by}")
        if request.exact and self.rounds:
            return Refusal(f"it rounds ({self.rounds}), and this call is exact")
        if self.max_bytes is not None and request.nbytes > self.max_bytes:
            return Refusal(f"{request.nbytes} bytes are more than its {self.max_bytes}")
        if request.nbytes < self.min_bytes:
            return Refusal(f"{request.nbytes} bytes are fewer than its {self.min_bytes}")
        if request.nbytes % self.multiple:
            return Refusal(f"{request.nbytes} bytes are not a multiple of {self.multiple}")
        return None


def dtype_name(dtype: torch.dtype) -> str:
    """'bfloat16' for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def size_name(nbytes: int) -> str:
    """'64 KB' for 65536; sizes that are no whole number of a unit in bytes."""
    for unit, shift in (("GB", 30), ("MB", 20), ("KB", 10)):
        if nbytes >= 1 << shift and nbytes % (1 << shift) == 0:
            return f"{nbytes >> shift} {unit}"
    return f"{nbytes} B"


class Communicator(abc.ABC):
    """One way of moving tensors between the ranks of a group.

    After construction either `refusal` is None and the communicator is live on every rank, or
    `refusal` says why not, the same on every rank. All attributes exist in both cases.
    """

    name: ClassVar[str]

    def __init__(
        self, group: Group, device: torch.device, settings: Settings | None = None
    ) -> None:
        self.group = group
        self.device = device
        self.settings = settings if settings is not None else group.settings
        self.capabilities: Capability | None = None
        self.refusal: Refusal | None = None
        self._closed = False
        forks.tell(self)
        self._open()

    @property
    def disabled(self) -> bool:
        """True when it refused at open or was closed."""
        return self.refusal is not None or self._closed

    @abc.abstractmethod
    def capability(self) -> Capability | Refusal:
        """What this rank could take part in. Looks at local facts only; no communication."""

    def allocate(self) -> Any:
        """Takes this rank's resources; returns a picklable handle for the peers."""
        return None

    def rendezvous(self, handles: Sequence[Any]) -> None:
        """Maps what the peers allocated, given the handles of all ranks in rank order."""
        return

    @abc.abstractmethod
    def run(
        self,
        op: str,
        out: torch.Tensor | None,
        inp: torch.Tensor | None,
        root: int = 0,
        by: str = "sum",
        splits: Splits | None = None,
    ) -> None:
        """Runs one collective that `capabilities` admits, on contiguous tensors.

        Args:
            op: one of OPS, whose table gives the shapes.
            root: rank of the root in the group, or of the peer (send, recv).
            by: of a reduction, one of BY.
            splits: of an all_to_all.
        Raises CommunicatorError or a subclass; after one the communicator stays unusable.
        """

    def capture(self) -> contextlib.AbstractContextManager[None]:
        """A scope around the capture of a CUDA graph. Most communicators need nothing there."""
        return contextlib.nullcontext()

    def release(self) -> None:
        """Gives the resources back. Called once, by close(), also after a failed open."""
        return

    def close(self) -> None:
        """Gives everything back. Idempotent; runs no collective, so peers may be gone."""
        if not self._closed:
            self._closed = True
            self.release()

    def after_fork(self) -> None:
        """In a forked child: it is refused, and close() does nothing."""
        self._closed = True
        self.refusal = Refusal(
            forks.sentence(f"{self.name} of group {self.group.name}", self.group.rank)
        )

    def require_live(self) -> None:
        """RefusedError unless it is live."""
        if self.refusal is not None:
            raise RefusedError(
                f"{self.name} is not in use on rank {self.group.rank}: {self.refusal}"
            )
        if self._closed:
            raise RefusedError(f"{self.name} was closed on rank {self.group.rank}")

    def _open(self) -> None:
        """capability -> agree -> allocate -> agree -> rendezvous -> agree; see the module's text.

        A step that fails on one rank becomes a Refusal on all: each rank reports its outcome, and
        what they decide on is the same list everywhere.
        """
        if self.name in self.settings.disable:
            mine: Capability | Refusal = Refusal("disabled by COMMUNICATORS_DISABLE")
        else:
            mine = self.capability()
        self.refusal, found = self._agree("capability", mine)
        if self.refusal is not None:
            return
        if any(other != mine for other in found):
            self.refusal = Refusal(f"its capabilities differ between ranks: {found}")
            return
        handle: Any
        try:
            handle = self.allocate()
        except (CommunicatorError, OSError, RuntimeError) as error:
            handle = Refusal(f"allocation failed: {error}")
        self.refusal, handles = self._agree("allocate", handle)
        if self.refusal is None:
            outcome: Any = None
            try:
                self.rendezvous(handles)
            except (CommunicatorError, OSError, RuntimeError) as error:
                outcome = Refusal(f"rendezvous failed: {error}")
            self.refusal, _ = self._agree("rendezvous", outcome)
        if self.refusal is not None:
            self.release()
            return
        assert isinstance(mine, Capability)
        self.capabilities = mine

    def _agree(self, step: str, mine: Any) -> tuple[Refusal | None, list[Any]]:
        """Gathers one value a rank; the first refusal, with its rank, is everybody's."""
        values = self.group.gather_objects(f"{self.name}.{step}", mine)
        for rank, value in enumerate(values):
            if isinstance(value, Refusal):
                reasons = {str(v) for v in values if isinstance(v, Refusal)}
                where = (
                    ""
                    if len(reasons) == 1
                    and len(values) == sum(isinstance(v, Refusal) for v in values)
                    else f"rank {rank}: "
                )
                return Refusal(f"{where}{value.reason}"), values
        return None, values
