"""How a process notices that another one has ended: the end of a socket.

Every process listens on a socket of its own and tells the peers where, through the store. Whoever
wants to know whether it lives connects, and never sends anything; nobody ever accepts. The kernel
resets such a connection when the listening process ends, whatever the reason and at once, also
where a pid means nothing: in another pid namespace, on another host. A stopped process keeps its
sockets, so late and dead differ.

Since nothing is accepted or read, a stranger who connects gains nothing and disturbs nobody. On
one host the socket is an abstract UNIX one with a random name. TCP is added, on the address alone
by which this host reaches the store, where that address is not the loopback.

One connection serves all groups between two processes. It is never given up while the other
process lives, since each takes a place in the other's backlog (net.core.somaxconn, 4096).
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import select
import socket
import threading
from dataclasses import dataclass
from typing import Any

from ..base import Refusal
from . import forks
from .hosts import Home

_BACKLOG = 4096
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}  # s, s: a host that is off


@dataclass(frozen=True)
class Address:
    """What a process tells the others of itself."""

    process: str  # random
    pid: int
    home: Home
    unix: str | None  # abstract name, without the leading NUL
    tcp: tuple[str, int] | None


class Lifeline:
    """The connection to one process. Ask `gone`."""

    def __init__(self, address: Address) -> None:
        self.pid = address.pid
        self.refusal: Refusal | None = None
        self._socket: socket.socket | None = None
        self._gone = False
        tried = []
        if address.unix is not None:
            code = self._connect(socket.AF_UNIX, "\0" + address.unix)
            if code == errno.ECONNREFUSED and address.home == Home.mine() and address.home.network:
                self._gone = True  # the name ends with the process
                return
            tried.append(f"its socket @{address.unix}: {os.strerror(code)}" if code else "")
        if self._socket is None and address.tcp is not None:
            family = socket.AF_INET6 if ":" in address.tcp[0] else socket.AF_INET
            code = self._connect(family, address.tcp)
            tried.append(f"{address.tcp[0]}:{address.tcp[1]}: {os.strerror(code)}" if code else "")
        if self._socket is None:
            self.refusal = Refusal("; ".join(tried) or "it has no address")

    def _connect(self, family: int, where: Any) -> int:
        """0 when the connection is there or under way."""
        try:
            connection = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as error:
            return error.errno or errno.EIO
        try:
            if family != socket.AF_UNIX:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for name, value in _KEEPALIVE.items():
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            code = connection.connect_ex(where)
        except OSError as error:
            code = error.errno or errno.EIO
        if code in (0, errno.EINPROGRESS):
            self._socket = connection
            return 0
        connection.close()
        return code

    @property
    def fd(self) -> int:
        """For poll(2): readable when `gone` may have changed; -1 when it will not."""
        return -1 if self._socket is None else self._socket.fileno()

    @property
    def gone(self) -> bool:
        """Whether the process has ended; False, too, where that cannot be seen (`refusal`)."""
        connection = self._socket
        if connection is None or self._gone:
            return self._gone
        poller = select.poll()
        poller.register(connection, select.POLLIN)
        if not poller.poll(0):
            return False
        try:
            ended = connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except (ConnectionResetError, BrokenPipeError):
            ended = True
        except OSError as error:  # TCP that never came to be, or a network that is down
            self.refusal = Refusal(f"the connection to it: {error.strerror}")
            self.close()
            return False
        self._gone = ended
        if not ended:
            self.refusal = Refusal("something else answers at its address")
        self.close()
        return self._gone

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


_lock = threading.Lock()
_lifelines: dict[str, Lifeline] = {}  # by process
_listeners: dict[str, socket.socket] = {}  # by the address that they listen on; "" is UNIX
_process = ""


def own_address(towards_store: str | None) -> Address:
    """This process, as the peers are told. Listens from now on.

    Args:
        towards_store: this host's address on the way to the store; None: it has none.
    """
    global _process
    with _lock:
        _process = _process or secrets.token_hex(16)
        unix: str | None = f"communicators-{_process}"
        tcp = None
        try:
            _listen("", socket.AF_UNIX, f"\0{unix}")
        except OSError:
            unix = None
        if towards_store is not None and not _is_loopback(towards_store):
            family = socket.AF_INET6 if ":" in towards_store else socket.AF_INET
            with contextlib.suppress(OSError):
                listener = _listen(towards_store, family, (towards_store, 0))
                tcp = (towards_store, listener.getsockname()[1])
        return Address(_process, os.getpid(), Home.mine(), unix, tcp)


def _listen(key: str, family: int, where: Any) -> socket.socket:
    if key not in _listeners:
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.bind(where)
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
        _listeners[key] = listener
    return _listeners[key]


def _is_loopback(host: str) -> bool:
    return host.startswith(("127.", "::ffff:127.")) or host in ("::1", "localhost")


def lifeline_to(address: Address) -> Lifeline | None:
    """The one lifeline to that process; None to this process itself."""
    with _lock:
        if address.process == _process:
            return None
        for process in [one for one, lifeline in _lifelines.items() if lifeline.gone]:
            if process != address.process:
                del _lifelines[process]
        if address.process not in _lifelines:
            _lifelines[address.process] = Lifeline(address)
        return _lifelines[address.process]


def _after_fork() -> None:
    """In the child: it is another process, and must not keep its parent's sockets open."""
    global _lock, _process
    _lock = threading.Lock()
    for listener in _listeners.values():
        listener.close()
    for lifeline in _lifelines.values():
        lifeline.close()
    _listeners.clear()
    _lifelines.clear()
    _process = ""


forks.call_in_child(_after_fork)
