"""The host side of a group of ranks: who is in it, and gather / agree / barrier with a deadline.

Everything here goes over a torch.distributed Store (TCPStore under torchrun), not over a process
group's collectives: with a store, a deadline can tell exactly which ranks have not arrived.
These calls are for set-up and objects, some tens of microseconds each; tensors go through
communicators.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from . import objects
from .errors import (
    CommMismatchError,
    CommTimeoutError,
    CommunicatorError,
    InvalidArgumentError,
    PeerDiedError,
)
from .settings import Settings


@dataclass(frozen=True)
class _NotUnpickled:
    """Stands for a value that arrived and cannot be had; what it raises waits for the end."""

    error: CommunicatorError


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

        Collective over the members when given a ProcessGroup.
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
                f"got {group!r}"
            )
        return cls(
            group.get_group_store(),
            group.rank(),
            group.size(),
            ranks=dist.get_process_group_ranks(group),
            name=f"pg-{group.group_name}",
            process_group=group,
            settings=settings,
        )

    def gather_objects(self, tag: str, value: Any, timeout_s: float | None = None) -> list[Any]:
        """Every rank's `value`, in rank order, on every rank.

        Args:
            tag: what the gather is for; ranks that are at different tags raise CommMismatchError.
            value: any picklable object, of any size; it is this rank's own element of the list.
            timeout_s: seconds; default `settings.timeout_s`. CommTimeoutError names the late ranks.

        If a rank's value cannot be pickled, all ranks raise that rank's InvalidArgumentError. A
        rank that cannot unpickle another's raises CommunicatorError, by itself. The ranks are in
        step after either, and after CommMismatchError.
        """
        if self.world_size == 1:
            return [value]
        keys = [f"{self._sequence}/{rank}" for rank in range(self.world_size)]
        refusal = None
        try:
            payload = objects.dumps(f"gather_objects({tag!r}, value)", value, self.rank)
            mine = objects.write(self._set, self.store, keys[self.rank], tag, payload)
            del payload
        except InvalidArgumentError as error:  # the others wait for this rank: they are told
            refusal = error
            mine = objects.Message(tag, 0, refusal=str(error))
            self._set(keys[self.rank], mine.packed())
        self._wait(keys, tag, timeout_s)
        with self._errors_of_store():
            messages = [objects.Message.unpacked(raw) for raw in self.store.multi_get(keys)]
            problem = self._disagreement(tag, messages)
            values: list[Any] = []
            if problem is None:
                values = self._unpickled(tag, keys, messages, value)
            else:
                objects.erase(self.store, keys[self.rank], mine)  # nobody reads them
            if self._sequence > 0:
                # Everybody has written this round, so everybody has read the one before.
                self.store.delete_key(f"{self._sequence - 1}/{self.rank}")
        self._sequence += 1
        if problem is not None:
            raise problem from refusal
        for found in values:
            if isinstance(found, _NotUnpickled):
                raise found.error
        return values

    def _disagreement(self, tag: str, messages: list[objects.Message]) -> CommunicatorError | None:
        """What all ranks raise in place of a result: they see the same messages."""
        for rank, message in enumerate(messages):
            if message.tag != tag:
                return CommMismatchError(
                    f"group {self.name}: rank {self.rank} is at {tag!r} and rank {rank} at "
                    f"{message.tag!r}; all ranks must make the same calls in the same order"
                )
        refusals = [message.refusal for message in messages if message.refusal is not None]
        return InvalidArgumentError(refusals[0]) if refusals else None

    def _unpickled(
        self, tag: str, keys: list[str], messages: list[objects.Message], mine: Any
    ) -> list[Any]:
        """The values of a round; whoever is the last to have read them erases the long ones."""
        values: list[Any] = []
        for rank, message in enumerate(messages):
            if rank == self.rank:
                values.append(mine)
                continue
            payload = objects.read(self.store, keys[rank], message)
            try:
                values.append(objects.loads(f"gather_objects({tag!r})", payload, f"rank {rank}"))
            except CommunicatorError as error:
                values.append(_NotUnpickled(error))
        if any(message.pieces for message in messages):
            readers = f"{self._sequence}/readers"
            if self.store.add(readers, 1) == self.world_size:
                for key, message in zip(keys, messages, strict=True):
                    objects.erase(self.store, key, message)
                self.store.delete_key(readers)
        return values

    def barrier(self, timeout_s: float | None = None) -> None:
        """Returns once every rank has called it; CommTimeoutError names the late ranks."""
        self.gather_objects("barrier", None, timeout_s)

    def broadcast_object(self, value: Any, src: int = 0, timeout_s: float | None = None) -> Any:
        """Rank `src`'s value, on every rank. Collective; errors as gather_objects."""
        if not 0 <= src < self.world_size:
            raise InvalidArgumentError(
                f"broadcast_object(src={src}): the ranks of this group are 0..{self.world_size - 1}"
            )
        mine = value if self.rank == src else None
        return self.gather_objects(f"broadcast from {src}", mine, timeout_s)[src]

    def send_object(self, value: Any, dst: int) -> None:
        """Sends a picklable object of any size to rank `dst`; returns at once.

        It lies in the store until `dst` has received it. InvalidArgumentError if it cannot be
        pickled: nothing was sent then.
        """
        self._check_peer("send_object", "dst", dst)
        payload = objects.dumps("send_object(value)", value, self.rank)
        number = self._sent.get(dst, 0) + 1
        objects.write(self._set, self.store, f"p2p/{self.rank}-{dst}/{number}", "", payload)
        self._sent[dst] = number

    def recv_object(self, src: int, timeout_s: float | None = None) -> Any:
        """The next object that rank `src` sent to this rank, in order.

        CommunicatorError, naming `src`, if it cannot be unpickled here: it is used up then. One
        that Ctrl-C interrupted stays the next one.
        """
        self._check_peer("recv_object", "src", src)
        number = self._received.get(src, 0) + 1
        key = f"p2p/{src}-{self.rank}/{number}"
        self._wait([key], f"recv_object from rank {src}", timeout_s, owners=[src])
        with self._errors_of_store():
            message = objects.Message.unpacked(self.store.get(key))
            payload = objects.read(self.store, key, message)
        try:
            value = objects.loads(f"recv_object(src={src})", payload, f"rank {src}")
        except CommunicatorError as error:
            value = _NotUnpickled(error)
        self._received[src] = number
        with self._errors_of_store():
            objects.erase(self.store, key, message)
            self.store.delete_key(key)
        if isinstance(value, _NotUnpickled):
            raise value.error
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

    @contextlib.contextmanager
    def _errors_of_store(self) -> Iterator[None]:
        try:
            yield
        except dist.DistError as error:
            raise self._store_gone(error) from error

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
