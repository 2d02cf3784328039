"""The host side of a group of ranks: who is in it, and gather / agree / barrier with a deadline.

Everything here goes over a torch.distributed Store (TCPStore under torchrun), not over a process
group's collectives: with a store, a deadline can tell exactly which ranks have not arrived.
These calls are for set-up and objects, some tens of microseconds each; tensors go through
communicators.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from ..errors import CommMismatchError, CommunicatorError, InvalidArgumentError, RefusedError
from ..settings import Settings, check_seconds
from . import forks, hosts, objects
from .calls import Call
from .meeting import MeetingPlace, wait_for
from .waiting import Waiter

_SETTLE_S = 1.0  # for the store to tell what became of a send that was cut short


@dataclass(frozen=True)
class _NotUnpickled:
    """Stands for a value that arrived and cannot be had; what it raises waits for the end."""

    error: BaseException


def _unpickled(call: str, payload: Any, sender: int) -> Any:
    """The value, or _NotUnpickled. Ctrl-C alone comes out: then the message stays the next one."""
    try:
        return objects.loads(call, payload, f"rank {sender}")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  (raised once the message is used up)
        return _NotUnpickled(error)


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
        if not isinstance(rank, int) or not 0 <= rank < world_size:
            raise InvalidArgumentError(
                f"Group({name}): rank {rank} is not in 0..{world_size - 1} (world size "
                f"{world_size})"
            )
        self.rank = rank
        self.world_size = world_size
        self.ranks = list(ranks) if ranks is not None else list(range(world_size))
        self.process_group = process_group
        self.settings = settings if settings is not None else Settings.from_environment()
        self.name = name
        self._forked = ""
        self._sequence = 0
        self._sent: dict[int, int] = {}
        self._received: dict[int, int] = {}
        meeting = MeetingPlace(store, f"communicators/{name}")
        self._waiter = Waiter(f"group {name}", rank, world_size, meeting)
        forks.tell(self)
        # Groups made in the same order on all members get the same generation, so a second group
        # of the same name does not read the first one's keys.
        generation = self._waiter.attend(
            lambda store, _: store.add(f"generation/{rank}", 1),
            "set-up",
            self.settings.timeout_s,
            {},
        )
        self.name = f"{name}.{generation}"
        self.store = PrefixStore(f"communicators/{self.name}", store)
        meeting = meeting.under(f"communicators/{self.name}")
        self._waiter = Waiter(f"group {self.name}", rank, world_size, meeting)
        if world_size > 1:
            self._waiter.attend(
                lambda store, _: self._waiter.peers.announce(store, meeting),
                "set-up",
                self.settings.timeout_s,
                {},
            )

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
            value: any picklable object, of any size; it is this rank's own element of the list.
            timeout_s: seconds; default `settings.timeout_s`. CommTimeoutError names the late ranks.

        If a rank's value cannot be pickled, all ranks raise that rank's InvalidArgumentError. A
        rank that cannot unpickle another's raises CommunicatorError, by itself. The ranks are in
        step after either, and after CommMismatchError.
        """
        self.require_own_process()
        if self.world_size == 1:
            return [value]
        keys = [f"{self._sequence}/{rank}" for rank in range(self.world_size)]
        refusal = None
        try:
            payload = objects.dumps(f"gather_objects({tag!r}, value)", value, self.rank)
            mine = objects.Message.of(tag, payload)
        except InvalidArgumentError as error:  # the others wait for this rank: they are told
            refusal = error
            payload, mine = memoryview(b""), objects.Message(tag, 0, refusal=str(error))

        def read(store: Store, found: list[bytes]) -> tuple[CommunicatorError | None, list[Any]]:
            messages = [objects.Message.unpacked(raw) for raw in found]
            problem = self._disagreement(tag, messages)
            payloads: list[Any] = []
            if problem is None:
                payloads = self._read_round(store, keys, messages)
            else:
                objects.erase(store, keys[self.rank], mine)  # nobody reads it
            if self._sequence > 0:
                # Everybody has written this round, so everybody has read the one before.
                store.delete_key(f"{self._sequence - 1}/{self.rank}")
            return problem, payloads

        put = objects.stored(keys[self.rank], mine, payload)
        problem, payloads = self._exchange(tag, put, dict(enumerate(keys)), timeout_s, read, True)
        values = self._unpickled(tag, payloads, value) if problem is None else []
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

    def _read_round(
        self, store: Store, keys: list[str], messages: list[objects.Message]
    ) -> list[Any]:
        """The payloads of a round; whoever is the last to have read them erases the long ones."""
        payloads = [
            None if rank == self.rank else objects.read(store, keys[rank], message)
            for rank, message in enumerate(messages)
        ]
        if not any(message.pieces for message in messages):
            return payloads
        readers = f"{self._sequence}/readers"
        if store.add(readers, 1) == self.world_size:
            for key, message in zip(keys, messages, strict=True):
                objects.erase(store, key, message)
            store.delete_key(readers)
        return payloads

    def _unpickled(self, tag: str, payloads: list[Any], mine: Any) -> list[Any]:
        values: list[Any] = []
        for rank, payload in enumerate(payloads):
            if rank == self.rank:
                values.append(mine)
                continue
            values.append(_unpickled(f"gather_objects({tag!r})", payload, rank))
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
        key = f"p2p/{self.rank}-{dst}/{number}"
        message = objects.Message.of("", payload)
        tag = f"send_object to rank {dst}"
        try:
            self._exchange(tag, objects.stored(key, message, payload), {})
        except BaseException:
            # Cut short: either it is there, whole, and counts, or nothing of it stays.
            def settle(store: Store, _: list[bytes]) -> bool:
                there = store.check([key])
                if not there:
                    objects.erase(store, key, message)
                return there

            with contextlib.suppress(CommunicatorError):  # the store may be what failed
                if self._exchange(tag, (), {}, _SETTLE_S, settle):
                    self._sent[dst] = number
            raise
        self._sent[dst] = number

    def recv_object(self, src: int, timeout_s: float | None = None) -> Any:
        """The next object that rank `src` sent to this rank, in order.

        CommunicatorError, naming `src`, if it cannot be unpickled here: it is used up then. One
        that Ctrl-C interrupted stays the next one.
        """
        self._check_peer("recv_object", "src", src)
        number = self._received.get(src, 0) + 1
        key = f"p2p/{src}-{self.rank}/{number}"
        tag = f"recv_object from rank {src}"

        def read(store: Store, found: list[bytes]) -> tuple[objects.Message, Any]:
            message = objects.Message.unpacked(found[0])
            return message, objects.read(store, key, message)

        message, payload = self._exchange(tag, (), {src: key}, timeout_s, read)
        value = _unpickled(f"recv_object(src={src})", payload, src)

        def erase(store: Store, _: list[bytes]) -> None:
            objects.erase(store, key, message)
            store.delete_key(key)

        self._received[src] = number
        self._exchange(tag, (), {}, after=erase)
        if isinstance(value, _NotUnpickled):
            raise value.error
        return value

    def attend(self, function: Callable[[], Any], tag: str, *, on_thread: bool = True) -> Any:
        """function(), in which torch meets the other ranks and has the settings' deadline itself.

        Raises PeerDiedError when one of them ends meanwhile, CommTimeoutError when it takes longer.

        Args:
            on_thread: False where it must run on this thread (its device is the thread's): then
                the function's own deadline is all there is.
        """
        self.require_own_process()
        return self._waiter.attend_torch(function, tag, self.settings.timeout_s, on_thread)

    def explain(self) -> list[str]:
        """What of the peers cannot be seen from this process, a line each; none when all can."""
        told = [*self._waiter.peers.explain(), *filter(None, [hosts.missing()])]
        return [f"  waits: {sentence}" for sentence in told]

    def require_own_process(self) -> None:
        """RefusedError in a forked child, which is no rank of the group."""
        if self._forked:
            raise RefusedError(self._forked)

    def after_fork(self) -> None:
        self._forked = forks.sentence(f"group {self.name}", self.rank)

    def _check_peer(self, call: str, argument: str, peer: int) -> None:
        if not isinstance(peer, int) or not 0 <= peer < self.world_size or peer == self.rank:
            raise InvalidArgumentError(
                f"{call}({argument}={peer!r}): another rank of the group of {self.world_size} is "
                f"expected; this is rank {self.rank}"
            )

    def _exchange(
        self,
        tag: str,
        put: Iterable[tuple[str, bytes]],
        want: Mapping[int, str],
        timeout_s: float | None = None,
        after: Callable[[Store, list[bytes]], Any] | None = None,
        together: bool = False,
    ) -> Any:
        """Sets the keys `put`, waits for those of `want` (by rank), and hands what they hold, in
        order, to `after`, whose value is returned. One call of the store's thread for all that.

        `together`: all ranks wait for the same keys.
        """
        self.require_own_process()
        seconds = check_seconds("timeout_s", timeout_s, self.settings)
        until = time.monotonic() + seconds
        keys = list(want.values())

        def work(store: Any, call: Call) -> Any:
            for key, payload in put:
                store.set(key, payload)
            found: list[bytes] = []
            if keys:
                if not wait_for(store, call, keys, until) and not call.left:
                    late = [rank for rank, key in want.items() if not store.check([key])]
                    if late:
                        raise self._waiter.late(late, tag, seconds)
                if call.left:
                    return None
                found = store.multi_get(keys)
                self._waiter.peers.learn(store, want)  # who has come has told its process before
            return None if after is None else after(store, found)

        return self._waiter.attend(work, tag, seconds, want, together)


def rank_span(ranks: Sequence[int]) -> str:
    """'0-7' for neighbours in order, '0.3.1' for others."""
    if list(ranks) == list(range(ranks[0], ranks[0] + len(ranks))):
        return f"{ranks[0]}-{ranks[-1]}"
    return ".".join(map(str, ranks))
