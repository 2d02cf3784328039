"""A store as the ranks of one group use it, in calls that their caller can leave.

One connection of a TCPStore serves one call at a time, and a rank may wait in it for minutes. So
each call takes a connection of its own out of a few that the process keeps for that store, and a
call that is left has its connection shut down, which ends the wait in it.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store

from . import forks
from .calls import Call

_SLICE_S = 0.2  # of a wait that cannot be ended from outside

_lock = threading.Lock()
#: Connections to TCPStores that are not in use, by where, with their descriptors (-1: not known).
_connections: dict[tuple[str, int], list[tuple[Store, int]]] = {}


class MeetingPlace:
    """`store` under `prefix`. `where` names it in errors; `address` is this host's towards it."""

    def __init__(self, store: Store, prefix: str) -> None:
        root: Any = store
        while isinstance(root, PrefixStore):
            root = root.underlying_store
        self._store, self._root, self._prefix = store, root, prefix
        self._space = ""
        self._key: tuple[str, int] | None = None
        if isinstance(root, TCPStore):
            self._key = (root.host, root.port)
        self.where = type(root).__name__ + (f" at {root.host}:{root.port}" if self._key else "")

    def under(self, prefix: str) -> MeetingPlace:
        """The same store under another prefix."""
        other = MeetingPlace(self._store, prefix)
        other._space = self._space
        return other

    def start(self, function: Callable[[Store, Call], Any]) -> Call:
        """function(store, call) on a thread."""
        return Call(lambda call: self._run(function, call))

    def _run(self, function: Callable[[Store, Call], Any], call: Call) -> Any:
        if self._key is None:
            return function(PrefixStore(self._prefix, self._store), call)
        if not self._space:
            # The prefixes that the caller's store has cannot be asked for, so what they stand for
            # gets a name of its own, the same on all ranks.
            mine = secrets.token_hex(8)
            found = self._store.compare_set("communicators/space", "", mine)
            self._space = found.decode()
        connection, descriptor = self._take()
        if descriptor >= 0:
            call.wake = lambda: _shut_down(descriptor)
        store = PrefixStore(f"communicators/{self._space}/{self._prefix}", connection)
        value = function(store, call)  # after an error the connection is not used again
        call.wake = None
        if not call.left:
            with _lock:
                _connections.setdefault(self._key, []).append((connection, descriptor))
        return value

    def _take(self) -> tuple[Store, int]:
        assert self._key is not None
        with _lock:
            idle = _connections.get(self._key)
            if idle:
                return idle.pop()
        own = self._root.clone()
        # torch has no call that ends a wait from outside, but tells the connection's descriptor.
        found = re.search(r"client=TCPClient\(SocketImpl\(fd=(\d+)", repr(own))
        return own, int(found[1]) if found else -1

    def address_towards(self) -> str | None:
        """This host's address on the route to the store's host; None where there is none."""
        if self._key is None:
            return None
        try:
            family, _, _, _, where = socket.getaddrinfo(*self._key, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(where)  # sends nothing; picks the route
                return str(probe.getsockname()[0])
        except OSError:
            return None


def wait_for(store: Store, call: Call, keys: list[str], until: float) -> bool:
    """Waits for all keys; False when `until` (of time.monotonic) passes, or the call is left."""
    while not call.left:
        left = max(0.001, until - time.monotonic())
        step = left if call.wake is not None else min(left, _SLICE_S)
        started = time.monotonic()
        try:
            store.wait(keys, datetime.timedelta(seconds=step))
        except RuntimeError:  # DistStoreError of a TCPStore, plain of a FileStore
            if time.monotonic() - started < 0.9 * step:
                raise
        else:
            return True
        if time.monotonic() >= until:
            return False
    return False


def _shut_down(descriptor: int) -> None:
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
        connection.shutdown(socket.SHUT_RDWR)


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    for idle in _connections.values():
        forks.keep(*(connection for connection, _ in idle))
    _connections.clear()


forks.call_in_child(_after_fork)
