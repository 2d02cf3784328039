"""How a rank of a group waits for others at the store: until they come, are late, or are dead."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch.distributed.distributed_c10d import Store

from ..errors import CommTimeoutError, CommunicatorError, PeerDiedError
from .calls import Call
from .lifelines import Address, Lifeline, lifeline_to, own_address
from .meeting import MeetingPlace

_SOON_S = 0.002  # most waits end within; only after it are the peers' lifelines looked at
_LOOK_S = 0.5  # between two looks for peers that have come meanwhile
_STORE_S = 0.5  # how long the store may take to answer, beyond the deadline
_DOUBT_S = 0.3  # what a process sent before it ended has reached the store after that


class Peers:
    """The processes of a group's ranks, as far as they are known, and the lifelines to them."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._known: dict[int, Lifeline | None] = {rank: None}  # None: this very process

    def announce(self, store: Store, meeting: MeetingPlace) -> None:
        """Tells the others of this process."""
        own = own_address(meeting.address_towards())
        payload: Any = pickle.dumps(own)  # bytes are stored as they are
        store.set(f"process/{self._rank}", payload)

    def unknown(self, ranks: Iterable[int]) -> list[int]:
        return [rank for rank in ranks if rank not in self._known]

    def learn(self, store: Store, ranks: Iterable[int]) -> None:
        """Connects to those of `ranks` that have announced themselves and are not known yet."""
        for rank in self.unknown(ranks):
            if store.check([f"process/{rank}"]):
                address = pickle.loads(store.get(f"process/{rank}"))
                assert isinstance(address, Address)
                self._known[rank] = lifeline_to(address)

    def descriptors(self, ranks: Iterable[int]) -> list[int]:
        """For poll(2): one becomes ready when a process of `ranks` ends."""
        lifelines = (self._known.get(rank) for rank in ranks)
        return [one.fd for one in lifelines if one is not None and one.fd >= 0]

    def gone(self, ranks: Iterable[int]) -> list[int]:
        """Those of `ranks` whose process has ended."""
        lifelines = ((rank, self._known.get(rank)) for rank in ranks)
        return [rank for rank, one in lifelines if one is not None and one.gone]

    def told(self, ranks: Iterable[int]) -> str:
        """'rank 1 (pid 7) and rank 2', for an error."""
        names = []
        for rank in ranks:
            lifeline = self._known.get(rank)
            names.append(f"rank {rank}" + (f" (pid {lifeline.pid})" if lifeline else ""))
        return " and ".join(names)

    def explain(self) -> list[str]:
        """Whose end would not be noticed, and why."""
        return [
            f"the end of rank {rank} is noticed at the deadline only, because {one.refusal}"
            for rank, one in sorted(self._known.items())
            if one is not None and one.refusal is not None
        ]


class Waiter:
    """Makes calls of the store for one rank of a group.

    Args:
        group: "group tp.1", for errors.
    """

    def __init__(self, group: str, rank: int, world_size: int, meeting: MeetingPlace) -> None:
        self.group, self.rank, self.world_size = group, rank, world_size
        self.meeting = meeting
        self.peers = Peers(rank)

    def attend(
        self,
        function: Callable[[Store, Call], Any],
        tag: str,
        seconds: float,
        keys: Mapping[int, str],
        together: bool = False,
    ) -> Any:
        """function(store, call), which ends by itself after `seconds`.

        Args:
            keys: by rank, what it waits for; a rank that ends without having set it is an error.
            together: so is one that ends before all are set, since all ranks wait for them.
        Raises PeerDiedError, or CommTimeoutError when the store itself does not answer in time.
        """
        now = time.monotonic()
        until, look = now + seconds + _STORE_S, now + _LOOK_S / 4
        watched = {rank for rank in keys if rank != self.rank}
        with self.meeting.start(function) as call:
            call.poll(_SOON_S)
            while not call.done and (now := time.monotonic()) < until:
                call.poll(min(until, look) - now, self.peers.descriptors(watched))
                if not call.done and (gone := self.peers.gone(watched)):
                    self._doubt(call, gone, tag, keys, together)
                    watched -= set(gone)
                if not call.done and time.monotonic() >= look:
                    look = self._look(watched)
            if not call.done:
                raise CommTimeoutError(
                    f"{self.group}: rank {self.rank} waited {seconds:g} s at {tag!r}, and the "
                    f"{self.meeting.where} does not answer: the process that hosts it (usually "
                    "rank 0 or the launcher) is stopped or cannot be reached"
                )
            try:
                return call.result()
            except CommunicatorError:
                raise
            except RuntimeError as error:  # a DistError of a TCPStore, plain of a FileStore
                raise self._store_gone(error, tag) from error

    def attend_torch(
        self, function: Callable[[], Any], tag: str, seconds: float, on_thread: bool
    ) -> Any:
        """function(), in which torch meets the other ranks; see Group.attend."""
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        until = time.monotonic() + seconds + _STORE_S
        try:
            if not on_thread:
                return function()
            with Call(lambda _: function()) as call:
                while not call.done and (now := time.monotonic()) < until:
                    call.poll(until - now, self.peers.descriptors(others))
                    # A peer that is done may end before this rank is.
                    if not call.done and (gone := self.peers.gone(others)):
                        call.poll(_DOUBT_S)
                        if not call.done:
                            raise self._died(gone, tag)
                if not call.done:
                    raise self.late(others, tag, seconds)
                return call.result()
        except CommunicatorError:
            raise
        except RuntimeError as error:  # of gloo and of the store; it does not say whom it is about
            if gone := self._ended_soon(others):
                raise self._died(gone, tag) from error
            first = (str(error).splitlines() or [""])[0]
            raise CommTimeoutError(
                f"{self.group}: rank {self.rank} did not meet the other ranks at {tag!r} within "
                f"{seconds:g} s: {first}"
            ) from error

    def late(self, ranks: Collection[int], tag: str, seconds: float) -> CommTimeoutError:
        return CommTimeoutError(
            f"{self.group}: rank {self.rank} waited {seconds:g} s at {tag!r} for "
            f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} of "
            f"{self.world_size}"
        )

    def _look(self, ranks: Iterable[int]) -> float:
        """Learns who has come meanwhile; when to look again."""
        ranks = self.peers.unknown(ranks)
        if not ranks:
            return float("inf")
        with self.meeting.start(lambda store, _: self.peers.learn(store, ranks)) as question:
            question.poll(_STORE_S)
            if not question.done or question.error is not None:
                return float("inf")  # the store's own trouble is seen by the call itself
        return time.monotonic() + _LOOK_S

    def _doubt(
        self, call: Call, gone: list[int], tag: str, keys: Mapping[int, str], together: bool
    ) -> None:
        """PeerDiedError, unless those who are gone did what is waited for before they ended."""
        call.poll(_DOUBT_S)
        if call.done:
            return
        asked = keys if together else gone
        with self.meeting.start(
            lambda store, _: [rank for rank in asked if not store.check([keys[rank]])]
        ) as question:
            question.poll(_STORE_S)
            answered = question.done and question.error is None
            missing = question.value if answered else gone
        if missing:
            raise self._died(gone if together else missing, tag)

    def _died(self, ranks: Iterable[int], tag: str) -> PeerDiedError:
        return PeerDiedError(
            f"{self.group}: {self.peers.told(ranks)} died or ended; rank {self.rank} waits for it "
            f"at {tag!r}"
        )

    def _store_gone(self, error: Exception, tag: str) -> PeerDiedError:
        gone = self._ended_soon([rank for rank in range(self.world_size) if rank != self.rank])
        if gone:
            return self._died(gone, tag)
        first = (str(error).splitlines() or [""])[0]
        return PeerDiedError(
            f"{self.group}: rank {self.rank} lost the {self.meeting.where} that the ranks meet at, "
            f"at {tag!r}; the process that hosts it (usually rank 0 or the launcher) is gone: "
            f"{first}"
        )

    def _ended_soon(self, ranks: Collection[int]) -> list[int]:
        """Who of them has ended: the ends of a process's sockets come one after another."""
        until = time.monotonic() + _DOUBT_S
        while not (gone := self.peers.gone(ranks)) and time.monotonic() < until:
            time.sleep(0.02)
        return gone
