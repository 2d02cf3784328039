"""The writer of readers on other hosts; wire.py has the protocol."""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import select
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from ..errors import CommTimeoutError, InvalidArgumentError, PeerDiedError, QueueClosedError
from ..settings import Settings
from .deadline import Deadline
from .wire import (
    ACK,
    ACK_FRAME,
    BROKEN_HANDSHAKE,
    BYE,
    CLOSED,
    DATA,
    DATA_FRAME,
    HELLO,
    HELLO_FRAME,
    PING,
    READY,
    REFUSED,
    TOKEN_BYTES,
    WELCOME,
    open_socket,
    option_of,
)

_PING_S = 0.25  # how often a late reader's connection is tried


@dataclass
class _Peer:
    rank: int
    identity: bytes
    read: int = 0  # messages
    gone: bool = False


class RemoteWriter:
    """The writer's side for all its remote readers.

    Args:
        readers: how many will join. window: messages that one may have unread.
        connect_ip: the address to bind; None: loopback.
    """

    def __init__(
        self, readers: int, window: int, connect_ip: str | None, settings: Settings
    ) -> None:
        self._expected = readers
        self._window = window
        self.rejected = 0  # connections and frames that were not a reader's
        self.others_left: Callable[[], bool] = lambda: False
        self._peers: dict[bytes, _Peer] = {}
        self._sent = 0
        self._history: list[list[Any]] = []  # frames, while a reader has not joined
        self._is_ready = False
        self._cancelled = False
        ip = "127.0.0.1" if connect_ip is None else connect_ip
        endpoint = f"tcp://[{ip}]:*" if ":" in ip else f"tcp://{ip}:*"
        self._context = zmq.Context()
        self._socket = open_socket(self._context, zmq.ROUTER, endpoint)
        public, secret = zmq.curve_keypair()
        self._socket.curve_secretkey, self._socket.curve_publickey = secret, public
        self._socket.curve_server = True
        self._socket.router_mandatory = True
        self._socket.maxmsgsize = 4096  # more than a handshake takes, or a reader sends
        self._monitor = self._socket.get_monitor_socket(BROKEN_HANDSHAKE)
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self.key = public + self._token
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise InvalidArgumentError(
                f"MessageQueue(connect_ip={connect_ip!r}): the address cannot be bound: {error}; "
                "an address of this host that the readers can reach is expected"
            ) from error
        endpoint_bound: Any = self._socket.last_endpoint
        self.address: str = endpoint_bound.decode().rstrip("\0")
        self._changed = threading.Condition()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._serve, name="message-queue", daemon=True)
        self._thread.start()

    # --- the thread -----------------------------------------------------------------------------

    def _serve(self) -> None:
        poll = select.poll()
        for fd in (option_of(self._socket, zmq.FD), option_of(self._monitor, zmq.FD), self._stop):
            poll.register(fd, select.POLLIN)
        while True:
            # The descriptors of ZeroMQ tell of changes, not of states: whoever used the socket has
            # looked at its events before letting go of the lock (see _receive).
            poll.poll(1000)
            with self._changed:
                if self._cancelled:
                    return
                self._receive()

    def _receive(self) -> None:
        """Handles all that has arrived. With the lock held."""
        while option_of(self._socket, zmq.EVENTS) & zmq.POLLIN:
            frames = self._socket.recv_multipart()
            if len(frames) != 2 or not self._handle(frames[0], frames[1]):
                self.rejected += 1
        while option_of(self._monitor, zmq.EVENTS) & zmq.POLLIN:
            recv_monitor_message(self._monitor)
            self.rejected += 1
        self._changed.notify_all()

    def _handle(self, identity: bytes, frame: bytes) -> bool:
        """Whether `frame` is one that a reader sends."""
        peer = self._peers.get(identity)
        if frame[:1] == HELLO and len(frame) == HELLO_FRAME.size and peer is None:
            _, rank, token = HELLO_FRAME.unpack(frame)
            if not hmac.compare_digest(token, self._token):
                return False
            self._join(identity, rank)
            return True
        if peer is None:
            return False
        if frame[:1] == ACK and len(frame) == ACK_FRAME.size:
            _, read = ACK_FRAME.unpack(frame)
            if not peer.read <= read <= self._sent:
                return False
            peer.read = read
            return True
        if frame == BYE:
            peer.gone = True
            return True
        return False

    def _join(self, identity: bytes, rank: int) -> None:
        others = {peer.rank for peer in self._peers.values()}
        if rank in others or len(others) == self._expected:
            why = "has joined before" if rank in others else f"is one more than {self._expected}"
            with contextlib.suppress(zmq.ZMQError):
                self._socket.send_multipart([identity, REFUSED, f"rank {rank} {why}".encode()])
            return
        peer = self._peers[identity] = _Peer(rank, identity)
        self._send_to(peer, [WELCOME])
        for frames in self._history:
            self._send_to(peer, frames)
        if len(self._peers) == self._expected:
            self._history.clear()
        if self._is_ready:
            self._send_to(peer, [READY])

    def _send_to(self, peer: _Peer, frames: Sequence[Any]) -> None:
        if peer.gone:
            return
        try:
            self._socket.send_multipart([peer.identity, *frames], copy=False)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            peer.gone = True  # its connection has ended

    # --- the queue's calls ----------------------------------------------------------------------

    def any_left(self) -> bool:
        """Whether a reader is there or still expected."""
        absent = self._expected - len(self._peers)
        return absent > 0 or any(not peer.gone for peer in self._peers.values())

    def _late(self) -> list[str]:
        late = [
            f"rank {peer.rank}"
            for peer in self._peers.values()
            if not peer.gone and self._sent - peer.read >= self._window
        ]
        absent = self._expected - len(self._peers)
        if absent and self._sent >= self._window:
            late.append(f"{absent} that {'has' if absent == 1 else 'have'} not joined")
        return late

    def wait_for_room(self, deadline: Deadline) -> None:
        """Returns once every reader may be sent one more message."""
        with self._changed:
            self._wait(self._late, "have not read enough", deadline)

    def wait_until_ready(self, deadline: Deadline) -> None:
        """Returns once every reader has joined."""

        def absent() -> list[str]:
            missing = self._expected - len(self._peers)
            return [f"{missing} of {self._expected} to join"] if missing else []

        with self._changed:
            self._wait(absent, "are missing", deadline)

    def _wait(self, late: Callable[[], list[str]], problem: str, deadline: Deadline) -> None:
        while names := late():
            if self._cancelled:
                raise QueueClosedError("message queue: this end was closed while it waited")
            for peer in self._peers.values():  # finds out whose connection has ended
                self._send_to(peer, [PING])
            self._receive()
            if late() and deadline.left() == 0.0:
                raise CommTimeoutError(
                    f"message queue: the writer waited {deadline.seconds:g} s for remote readers "
                    f"that {problem}: {', '.join(names)}"
                )
            if late():
                self._changed.wait(min(deadline.left(), _PING_S))
        if not self.any_left() and not self.others_left():
            ranks = ", ".join(str(peer.rank) for peer in self._peers.values())
            raise PeerDiedError(
                f"message queue: no reader is left; the connections of rank {ranks} have ended"
            )

    def send(self, kind: int, parts: Sequence[Any], buffers: Sequence[memoryview]) -> None:
        """Sends one message to all. wait_for_room() must have returned."""
        with self._changed:
            header = DATA_FRAME.pack(DATA, self._sent, kind)
            # Copies: the caller may change its buffers once enqueue() has returned.
            frames = [zmq.Frame(f) for f in (header, b"".join(parts), *map(bytes, buffers))]
            self._sent += 1
            if len(self._peers) < self._expected:
                self._history.append(frames)
            for peer in self._peers.values():
                self._send_to(peer, frames)
            self._receive()

    def set_ready(self) -> None:
        """Lets the readers' wait_until_ready return."""
        with self._changed:
            self._is_ready = True
            for peer in self._peers.values():
                self._send_to(peer, [READY])
            self._receive()

    def cancel(self) -> None:
        """Wakes whoever waits in here; from then on every wait fails."""
        self._cancelled = True
        os.eventfd_write(self._stop, 1)
        if self._changed.acquire(timeout=0.1):
            self._changed.notify_all()
            self._changed.release()

    def announce_close(self) -> None:
        """Tells the readers that nothing more will come."""
        if self._changed.acquire(timeout=0.1):
            for peer in self._peers.values():
                self._send_to(peer, [CLOSED])
            self._changed.release()

    def close(self) -> None:
        """The same, and gives everything back; waits up to LINGER_MS for what is not sent yet."""
        self.announce_close()
        self._thread.join(2.0)
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close()
        self._context.term()
        os.close(self._stop)
