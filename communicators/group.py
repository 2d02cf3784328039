"""The host side of a group of ranks: who is in it, and gather / agree / barrier with a deadline.

Everything here goes over a torch.distributed Store (TCPStore under torchrun), not over a process
group's collectives: with a store, a deadline can tell exactly which ranks have not arrived.
These calls are for set-up and objects, some tens of microseconds each; tensors go through
communicators.
"""

from __future__ import annotations

import datetime
import pickle
import time
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from .errors import CommMismatchError, CommTimeoutError, InvalidArgumentError, PeerDiedError
from .settings import Settings


class Group:
    """A set of ranks with a store between them.

    Attributes:
        rank: this process's rank in the group, 0..world_size-1.
        world_size: number of ranks.
        ranks: the global ranks of the members, in group order.
        name: the same on all members, unique among the groups of the store.
        process_group: the torch.distributed group behind it, or None (a stateless group).
        store: where the ranks meet; its keys are this group's own.
        settings: the process's Settings.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        *,
        ranks: Sequence[int] | None = None,
        name: str = "group",
        process_group: dist.ProcessGroup | None = None,
        settings: Settings | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise InvalidArgumentError(
                f"Group({name}): rank {rank} is not in 0..{world_size - 1} (world size "
                f"{world_size})"
            )
        self.rank = rank
        self.world_size = world_size
        self.ranks = list(ranks) if ranks is not None else list(range(world_size))
        self.process_group = process_group
        self.settings = settings if settings is not None else Settings.from_environment()
        # Groups made in the same order on all members get the same generation, so a second group
        # of the same name does not read the first one's keys.
        generation = store.add(f"communicators/{name}/generation/{rank}", 1)
        self.name = f"{name}.{generation}"
        self.store = PrefixStore(f"communicators/{self.name}", store)
        self._sequence = 0
        self._sent: dict[int, int] = {}
        self._received: dict[int, int] = {}

    @classmethod
    def of(cls, group: Group | dist.ProcessGroup | None, settings: Settings | None = None) -> Group:
        """A Group for a torch ProcessGroup (None: the default one); a Group is returned as it is.

        Collective over the members when given a ProcessGroup. One that torch.distributed does not
        know (made by its constructor, as vLLM's stateless ones) serves by its store and ranks
        alone: its `ranks` are 0..world_size-1 and `process_group` is None, because
        torch.distributed's functions do not take it.
        """
        if isinstance(group, Group):
            return group
        if group is None:
            if not dist.is_initialized():
                raise InvalidArgumentError(
                    "Group.of(None): torch.distributed is not initialised; call "
                    "init_distributed_environment() first or pass a group"
                )
            group = dist.group.WORLD
        if not isinstance(group, dist.ProcessGroup):
            raise InvalidArgumentError(
                f"Group.of(group): a ProcessGroup of which this process is a member is expected, "
                f"got {group!r}; where there is only a backend, Group(store, rank, world_size) "
                f"takes the store that it was made with"
            )
        known = group in dist.distributed_c10d._world.pg_group_ranks
        store = group.get_group_store()
        if store is None:
            raise InvalidArgumentError(
                f"Group.of(group): the ProcessGroup of rank {group.rank()} of {group.size()} has "
                f"no store; one made with a store, or Group(store, rank, world_size), is accepted"
            )
        try:
            name = f"pg-{group.group_name}"
        except RuntimeError:  # none was set
            name = "pg-without-name"
        return cls(
            store,
            group.rank(),
            group.size(),
            ranks=dist.get_process_group_ranks(group) if known else None,
            name=name,
            process_group=group if known else None,
            settings=settings,
        )

    def gather_objects(self, tag: str, value: Any, timeout_s: float | None = None) -> list[Any]:
        """Every rank's `value`, in rank order, on every rank.

        Args:
            tag: what the gather is for; ranks that are at different tags raise CommMismatchError.
            value: any picklable object.
            timeout_s: seconds; default `settings.timeout_s`. CommTimeoutError names the late ranks.
        """
        if self.world_size == 1:
            return [value]
        keys = [f"{self._sequence}/{rank}" for rank in range(self.world_size)]
        self._set(keys[self.rank], pickle.dumps((tag, value)))
        self._wait(keys, tag, timeout_s)
        answers = [pickle.loads(payload) for payload in self.store.multi_get(keys)]
        for rank, (their_tag, _) in enumerate(answers):
            if their_tag != tag:
                raise CommMismatchError(
                    f"group {self.name}: rank {self.rank} is at {tag!r} and rank {rank} at "
                    f"{their_tag!r}; all ranks must make the same calls in the same order"
                )
        if self._sequence > 0:
            # Everybody has written this round, so everybody has read the one before.
            self.store.delete_key(f"{self._sequence - 1}/{self.rank}")
        self._sequence += 1
        return [value for _, value in answers]

    def barrier(self, timeout_s: float | None = None) -> None:
        """Returns once every rank has called it; CommTimeoutError names the late ranks."""
        self.gather_objects("barrier", None, timeout_s)

    def broadcast_object(self, value: Any, src: int = 0, timeout_s: float | None = None) -> Any:
        """Rank `src`'s value, on every rank. Collective."""
        mine = value if self.rank == src else None
        return self.gather_objects(f"broadcast from {src}", mine, timeout_s)[src]

    def send_object(self, value: Any, dst: int) -> None:
        """Sends a picklable object to rank `dst`; returns at once."""
        self._check_peer("send_object", "dst", dst)
        number = self._sent[dst] = self._sent.get(dst, 0) + 1
        self._set(f"p2p/{self.rank}-{dst}/{number}", pickle.dumps(value))

    def recv_object(self, src: int, timeout_s: float | None = None) -> Any:
        """The next object that rank `src` sent to this rank, in order."""
        self._check_peer("recv_object", "src", src)
        number = self._received.get(src, 0) + 1
        key = f"p2p/{src}-{self.rank}/{number}"
        self._wait([key], f"recv_object from rank {src}", timeout_s, owners=[src])
        value = pickle.loads(self.store.get(key))
        self.store.delete_key(key)
        self._received[src] = number
        return value

    def _check_peer(self, call: str, argument: str, peer: int) -> None:
        if not 0 <= peer < self.world_size or peer == self.rank:
            raise InvalidArgumentError(
                f"{call}({argument}={peer}): another rank of the group of {self.world_size} is "
                f"expected; this is rank {self.rank}"
            )

    def _set(self, key: str, payload: bytes) -> None:
        try:
            self.store.set(key, payload)  # type: ignore[arg-type]  # bytes are stored as they are
        except dist.DistError as error:
            raise self._store_gone(error) from error

    def _wait(
        self,
        keys: list[str],
        tag: str,
        timeout_s: float | None,
        owners: Sequence[int] | None = None,
    ) -> None:
        deadline = self.settings.timeout_s if timeout_s is None else timeout_s
        started = time.monotonic()
        try:
            self.store.wait(keys, datetime.timedelta(seconds=deadline))
            return
        except RuntimeError as error:  # DistStoreError of a TCPStore, plain of a FileStore
            if time.monotonic() - started < 0.9 * deadline:
                raise self._store_gone(error) from error
        owners = range(self.world_size) if owners is None else owners
        late = [rank for key, rank in zip(keys, owners, strict=True) if not self.store.check([key])]
        raise CommTimeoutError(
            f"group {self.name}: rank {self.rank} waited {deadline:g} s at {tag!r} for "
            f"rank{'s' if len(late) > 1 else ''} {', '.join(map(str, late))} of {self.world_size}"
        )

    def _store_gone(self, error: Exception) -> PeerDiedError:
        return PeerDiedError(
            f"group {self.name}: rank {self.rank} lost the store that the ranks meet at; the "
            f"process that hosts it (usually rank 0 or the launcher) is gone: {error}"
        )


def rank_span(ranks: Sequence[int]) -> str:
    """'0-7' for neighbours in order, '0.3.1' for others."""
    if list(ranks) == list(range(ranks[0], ranks[0] + len(ranks))):
        return f"{ranks[0]}-{ranks[-1]}"
    return ".".join(map(str, ranks))
