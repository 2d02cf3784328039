"""The host side of a group of ranks: who is in it, and gather / agree / barrier with a deadline.

Everything here goes over a torch.distributed Store (TCPStore under torchrun), not over a process
group's collectives: with a store, a deadline can tell exactly which ranks have not arrived.
These calls are for set-up and objects, some tens of microseconds each; tensors go through
communicators.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from . import forks, hosts
from .calls import Call
from .errors import CommMismatchError, InvalidArgumentError, RefusedError
from .meeting import MeetingPlace, wait_for
from .settings import Settings, check_seconds
from .waiting import Waiter


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
            value: any picklable object.
            timeout_s: seconds; default `settings.timeout_s`. CommTimeoutError names the late ranks.
        """
        self.require_own_process()
        if self.world_size == 1:
            return [value]
        keys = [f"{self._sequence}/{rank}" for rank in range(self.world_size)]
        payloads = self._exchange(
            tag,
            {keys[self.rank]: pickle.dumps((tag, value))},
            dict(enumerate(keys)),
            timeout_s,
            # Everybody has written this round, so everybody has read the one before.
            drop=[f"{self._sequence - 1}/{self.rank}"] if self._sequence > 0 else [],
            together=True,
        )
        answers = [pickle.loads(payload) for payload in payloads]
        for rank, (their_tag, _) in enumerate(answers):
            if their_tag != tag:
                raise CommMismatchError(
                    f"group {self.name}: rank {self.rank} is at {tag!r} and rank {rank} at "
                    f"{their_tag!r}; all ranks must make the same calls in the same order"
                )
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
        key = f"p2p/{self.rank}-{dst}/{number}"
        self._exchange(f"send_object to rank {dst}", {key: pickle.dumps(value)}, {})

    def recv_object(self, src: int, timeout_s: float | None = None) -> Any:
        """The next object that rank `src` sent to this rank, in order."""
        self._check_peer("recv_object", "src", src)
        number = self._received.get(src, 0) + 1
        key = f"p2p/{src}-{self.rank}/{number}"
        (payload,) = self._exchange(f"recv_object from rank {src}", {}, {src: key}, timeout_s)
        value = pickle.loads(payload)
        self._exchange(f"recv_object from rank {src}", {}, {}, drop=[key])
        self._received[src] = number
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
        put: Mapping[str, bytes],
        want: Mapping[int, str],
        timeout_s: float | None = None,
        drop: Sequence[str] = (),
        together: bool = False,
    ) -> list[bytes]:
        """Sets the keys `put`, waits for those of `want` (by rank), then deletes those of `drop`.

        `together`: all ranks wait for the same keys. Returns what the wanted keys hold, in order.
        It is one call of the store's thread.
        """
        self.require_own_process()
        seconds = check_seconds("timeout_s", timeout_s, self.settings)
        until = time.monotonic() + seconds
        keys = list(want.values())

        def work(store: Any, call: Call) -> list[bytes]:
            for key, payload in put.items():
                store.set(key, payload)
            found = []
            if keys:
                if not wait_for(store, call, keys, until) and not call.left:
                    late = [rank for rank, key in want.items() if not store.check([key])]
                    if late:
                        raise self._waiter.late(late, tag, seconds)
                if call.left:
                    return []
                found = store.multi_get(keys)
                self._waiter.peers.learn(store, want)  # who has come has told its process before
            for key in drop:
                store.delete_key(key)
            return found

        return self._waiter.attend(work, tag, seconds, want, together)


def rank_span(ranks: Sequence[int]) -> str:
    """'0-7' for neighbours in order, '0.3.1' for others."""
    if list(ranks) == list(range(ranks[0], ranks[0] + len(ranks))):
        return f"{ranks[0]}-{ranks[-1]}"
    return ".".join(map(str, ranks))
