"""GroupCoordinator: what a tensor-parallel job talks to. One object a group of ranks.

Tensors travel as collectives.py says, by the dispatcher of their device; objects on the host side.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from ..backends.nccl.pynccl import PyNcclCommunicator
from ..errors import CommunicatorError, TopologyError
from ..selection import opening
from ..selection.dispatcher import Dispatcher
from ..settings import Settings
from .group import Group, rank_span
from .group_objects import GroupObjects
from .object_broadcast import ObjectBroadcaster
from .open_groups import OPEN_GROUPS
from .traced import order_tensor


class GroupCoordinator(GroupObjects):
    """The collectives of one group of ranks, on one device per rank. Construction is collective.

    Args:
        ranks: global ranks of the members, in group order; this process must be one of them.
        device: this rank's device.
        name: unique among the open groups of this process, the same on all members.
        settings: default: read from the environment.

    Attributes:
        rank: this process's global rank.      rank_in_group: its rank here.
        ranks, world_size: the members.        device: where tensors are.
        cpu_group, device_group: torch process groups for host memory and for the device.

    Every collective raises InvalidArgumentError for arguments no rank may pass, and the errors of
    the communicator that runs it (CommTimeoutError, PeerDiedError, CommMismatchError).
    """

    def __init__(
        self,
        ranks: Sequence[int],
        device: torch.device | str,
        name: str,
        settings: Settings | None = None,
    ) -> None:
        self.name = name
        self.ranks = list(ranks)
        self.rank = dist.get_rank()
        self.device = torch.device(device)
        self.settings = settings if settings is not None else Settings.from_environment()
        if self.rank not in self.ranks or len(set(self.ranks)) != len(self.ranks):
            raise TopologyError(
                f"group {name!r} of ranks {self.ranks}: distinct ranks are expected, rank "
                f"{self.rank} (this one) among them"
            )
        if name in OPEN_GROUPS:
            raise TopologyError(f"a group {name!r} is open already on rank {self.rank}; close it")
        self.world_size = len(self.ranks)
        self.rank_in_group = self.ranks.index(self.rank)
        assert dist.group.WORLD is not None  # get_rank() above has checked it
        self.group = Group(
            dist.group.WORLD.get_group_store(),
            self.rank_in_group,
            self.world_size,
            ranks=self.ranks,
            name=f"{name}[{rank_span(self.ranks)}]",  # groups of one name may lie side by side
            settings=self.settings,
        )
        self.cpu_group = opening.process_group_over(self.group, "cpu")
        self.group.process_group = self.cpu_group
        self.device_group = self.cpu_group
        if self.device.type != "cpu":
            self.device_group = opening.process_group_over(self.group, self.device.type)
        self._objects = ObjectBroadcaster(self.group)
        self._dispatchers: dict[str, Dispatcher] = {}
        self._dispatcher_at = {}
        self._order = order_tensor(self.device)
        if self.world_size > 1:
            for at, process_group in self._devices():
                self._dispatchers[at.type] = opening.open_dispatcher(self.group, at, process_group)
        self._host = self._dispatchers.get("cpu")
        self._closed = False
        OPEN_GROUPS[name] = self

    def _devices(self) -> Iterator[tuple[torch.device, dist.ProcessGroup]]:
        """The device itself, and host memory, where metadata and offloaded tensors live."""
        yield self.device, self.device_group
        if self.device.type != "cpu":
            yield torch.device("cpu"), self.cpu_group

    # -- who is who ---------------------------------------------------------------------------

    @property
    def first_rank(self) -> int:
        """Global rank of the first member."""
        return self.ranks[0]

    @property
    def last_rank(self) -> int:
        """Global rank of the last member."""
        return self.ranks[-1]

    @property
    def pynccl_comm(self) -> PyNcclCommunicator | None:
        """NCCL's communicator on the GPUs, for `use_symmetric_memory`; None where none is live."""
        live = self._dispatchers["cuda"].live if "cuda" in self._dispatchers else ()
        return next((one for one in live if isinstance(one, PyNcclCommunicator)), None)

    @property
    def is_first_rank(self) -> bool:
        return self.rank_in_group == 0

    @property
    def is_last_rank(self) -> bool:
        return self.rank_in_group == self.world_size - 1

    @property
    def next_rank(self) -> int:
        """Global rank of the next member, cyclic."""
        return self.ranks[(self.rank_in_group + 1) % self.world_size]

    @property
    def prev_rank(self) -> int:
        """Global rank of the previous member, cyclic."""
        return self.ranks[(self.rank_in_group - 1) % self.world_size]

    # -- life ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """A scope in which a CUDA graph that contains this group's collectives is captured."""
        with contextlib.ExitStack() as stack:
            for dispatcher in self._dispatchers.values():
                stack.enter_context(dispatcher.capture())
            yield

    def dispatcher(self) -> Dispatcher:
        """The dispatcher of the group's own device. CommunicatorError for a group of one rank."""
        if self.world_size == 1:
            raise CommunicatorError(f"group {self.name} has one rank and no communicators")
        return self._dispatchers[self.device.type]

    def explain(self) -> str:
        """What is used for which collective, and why each other communicator is not."""
        if self.world_size == 1:
            return f"group {self.name}: one rank, nothing to communicate"
        parts = [dispatcher.explain() for dispatcher in self._dispatchers.values()]
        return "\n".join([*parts, self._objects.explain(), *self.group.explain()])

    def after_fork(self) -> None:
        """In a forked child, where its group refuses all calls: close() does nothing."""
        self._closed = True
        self._dispatcher_at.clear()
        self._host = None

    def close(self) -> None:
        """Closes the communicators, then their process groups. Idempotent."""
        if self._closed:
            return
        self._closed = True
        OPEN_GROUPS.pop(self.name, None)
        self._objects.close()
        for dispatcher in self._dispatchers.values():
            dispatcher.close()
        for process_group in {id(g): g for g in (self.device_group, self.cpu_group)}.values():
            dist.destroy_process_group(process_group)
