"""Readers of a MessageQueue on other hosts: ZeroMQ over TCP, encrypted and authenticated by CURVE.

The writer binds one ROUTER socket; each reader connects a DEALER. The handle carries the server's
public key, which never crosses the wire in clear (CurveZMQ, rfc.zeromq.org/spec/26), and a token.
A peer without the key does not get past the handshake; one without the token is not listened to. No
byte that the writer receives is ever unpickled, and a reader unpickles only what came encrypted by
the holder of the server's secret key.

    frames to the writer     HELLO rank token      ACK number of messages read      BYE
    frames to a reader       WELCOME   READY   DATA number kind, stream, buffers...   PING   CLOSED
                             REFUSED text

A message waits in the writer until every expected reader has joined, and at most `window` messages
are unread by any reader: that is what enqueue() waits for. The connection is the reader's life: TCP
repeats what a broken link lost, and a connection that the peer's kernel ended, or that was silent
for HEARTBEAT_TIMEOUT_MS, is a dead peer. A thread of the writer, asleep in poll() unless a frame
arrives, serves readers that join or read while the program does something else.
"""

from __future__ import annotations

import contextlib
import hmac
import math
import os
import secrets
import select
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import zmq
from zmq.utils.monitor import recv_monitor_message

from .errors import (
    CommTimeoutError,
    CommunicatorError,
    InvalidArgumentError,
    PeerDiedError,
    QueueClosedError,
    RefusedError,
)
from .settings import Settings
from .shm_ring import Deadline

HEARTBEAT_MS = 5_000
HEARTBEAT_TIMEOUT_MS = 60_000
LINGER_MS = 5_000  # how long close() may take to send what was enqueued
_KEY_BYTES, _TOKEN_BYTES = 40, 32  # a CURVE key in Z85; of our own
_PING_S = 0.25  # how often a late reader's connection is tried

_HELLO, _ACK, _BYE = b"H", b"A", b"B"
_WELCOME, _READY, _DATA, _PING, _CLOSED, _REFUSED = b"W", b"S", b"D", b"P", b"C", b"R"
_HELLO_FRAME = struct.Struct(f"!cq{_TOKEN_BYTES}s")
_ACK_FRAME = struct.Struct("!cQ")
_DATA_FRAME = struct.Struct("!cQB")

_BROKEN_HANDSHAKE = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


def _socket(context: zmq.Context, kind: int, address: str) -> zmq.Socket:
    if not zmq.has("curve"):
        raise RefusedError(
            "message queue: readers on other hosts need a pyzmq whose libzmq has CURVE (the wheels "
            "on PyPI have it); this one was built without"
        )
    socket = context.socket(kind)
    socket.sndhwm = socket.rcvhwm = 0  # the window bounds both
    socket.linger = LINGER_MS
    socket.heartbeat_ivl = HEARTBEAT_MS
    socket.heartbeat_timeout = HEARTBEAT_TIMEOUT_MS
    socket.ipv6 = "[" in address
    return socket


def _option(socket: zmq.Socket, option: int) -> int:
    value = socket.getsockopt(option)
    assert isinstance(value, int)
    return value


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
        self._socket = _socket(self._context, zmq.ROUTER, endpoint)
        public, secret = zmq.curve_keypair()
        self._socket.curve_secretkey, self._socket.curve_publickey = secret, public
        self._socket.curve_server = True
        self._socket.router_mandatory = True
        self._socket.maxmsgsize = 4096  # more than a handshake takes, or a reader sends
        self._monitor = self._socket.get_monitor_socket(_BROKEN_HANDSHAKE)
        self._token = secrets.token_bytes(_TOKEN_BYTES)
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
        for fd in (_option(self._socket, zmq.FD), _option(self._monitor, zmq.FD), self._stop):
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
        while _option(self._socket, zmq.EVENTS) & zmq.POLLIN:
            frames = self._socket.recv_multipart()
            if len(frames) != 2 or not self._handle(frames[0], frames[1]):
                self.rejected += 1
        while _option(self._monitor, zmq.EVENTS) & zmq.POLLIN:
            recv_monitor_message(self._monitor)
            self.rejected += 1
        self._changed.notify_all()

    def _handle(self, identity: bytes, frame: bytes) -> bool:
        """Whether `frame` is one that a reader sends."""
        peer = self._peers.get(identity)
        if frame[:1] == _HELLO and len(frame) == _HELLO_FRAME.size and peer is None:
            _, rank, token = _HELLO_FRAME.unpack(frame)
            if not hmac.compare_digest(token, self._token):
                return False
            self._join(identity, rank)
            return True
        if peer is None:
            return False
        if frame[:1] == _ACK and len(frame) == _ACK_FRAME.size:
            _, read = _ACK_FRAME.unpack(frame)
            if not peer.read <= read <= self._sent:
                return False
            peer.read = read
            return True
        if frame == _BYE:
            peer.gone = True
            return True
        return False

    def _join(self, identity: bytes, rank: int) -> None:
        others = {peer.rank for peer in self._peers.values()}
        if rank in others or len(others) == self._expected:
            why = "has joined before" if rank in others else f"is one more than {self._expected}"
            with contextlib.suppress(zmq.ZMQError):
                self._socket.send_multipart([identity, _REFUSED, f"rank {rank} {why}".encode()])
            return
        peer = self._peers[identity] = _Peer(rank, identity)
        self._send_to(peer, [_WELCOME])
        for frames in self._history:
            self._send_to(peer, frames)
        if len(self._peers) == self._expected:
            self._history.clear()
        if self._is_ready:
            self._send_to(peer, [_READY])

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
                self._send_to(peer, [_PING])
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
            header = _DATA_FRAME.pack(_DATA, self._sent, kind)
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
                self._send_to(peer, [_READY])
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
                self._send_to(peer, [_CLOSED])
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


class RemoteReader:
    """A reader's side. Joining goes on in the background; wait_until_ready or dequeue report it."""

    def __init__(
        self, address: str, key: bytes, rank: int, window: int, settings: Settings
    ) -> None:
        self.rank = rank
        self._address = address
        self._ack_every = max(1, window // 2)
        self._inbox: deque[tuple[int, list[zmq.Frame]]] = deque()
        self._received = 0  # messages that came
        self._taken = self._acked = 0
        self._welcome = self._is_ready = self._closed = self._lost = self._cancelled = False
        self._context = zmq.Context()
        self._socket = _socket(self._context, zmq.DEALER, address)
        self._socket.curve_publickey, self._socket.curve_secretkey = zmq.curve_keypair()
        self._socket.curve_serverkey = key[:_KEY_BYTES]
        self._monitor = self._socket.get_monitor_socket(_BROKEN_HANDSHAKE | zmq.EVENT_DISCONNECTED)
        self._socket.connect(address)
        self._socket.send(_HELLO_FRAME.pack(_HELLO, rank, key[_KEY_BYTES:]))
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._poller = zmq.Poller()
        for item in (self._socket, self._monitor, self._stop):
            self._poller.register(item, zmq.POLLIN)

    def _advance(self, deadline: Deadline, waiting_for: str) -> None:
        """Waits for one frame or event, and handles it."""
        ready = dict(self._poller.poll(math.ceil(min(deadline.left(), 1e6) * 1e3)))
        if self._cancelled:
            raise QueueClosedError("message queue: this end was closed while it waited")
        if self._socket in ready:
            self._handle(self._socket.recv_multipart(copy=False))
        elif self._monitor in ready:
            recv_monitor_message(self._monitor)
            self._lost = True  # but what came before is read first
        elif self._closed:
            raise QueueClosedError(
                f"message queue: the writer has closed it; rank {self.rank} has read everything"
            )
        elif self._lost:
            raise self._connection_error()
        elif deadline.left() == 0.0:
            raise CommTimeoutError(
                f"message queue: reader rank {self.rank} waited {deadline.seconds:g} s for "
                f"{waiting_for} from the writer at {self._address}"
                + ("" if self._welcome else ", which has not answered at all yet")
            )

    def _connection_error(self) -> CommunicatorError:
        if not self._welcome:
            return RefusedError(
                f"message queue: the writer at {self._address} refused the connection of rank "
                f"{self.rank}: the key of the handle is not that of the queue that listens there"
            )
        return PeerDiedError(
            f"message queue: the connection of reader rank {self.rank} to the writer at "
            f"{self._address} has ended; the writer is gone"
        )

    def _handle(self, frames: list[zmq.Frame]) -> None:
        header = frames[0].bytes
        kind = header[:1]
        if kind == _DATA:
            _, number, message_kind = _DATA_FRAME.unpack(header)
            if number != self._received:
                raise CommunicatorError(
                    f"message queue: reader rank {self.rank} received message {number} after "
                    f"{self._received - 1}"
                )
            self._received += 1
            self._inbox.append((message_kind, frames[1:]))
        elif kind == _WELCOME:
            self._welcome = True
        elif kind == _READY:
            self._is_ready = True
        elif kind == _CLOSED:
            self._closed = True
        elif kind == _REFUSED:
            raise InvalidArgumentError(
                f"create_from_handle(handle, rank={self.rank}): {frames[1].bytes.decode()}; every "
                "remote reader joins once, with a rank of its own"
            )

    def wait_until_ready(self, deadline: Deadline) -> None:
        """Returns once the writer has seen every reader."""
        while not self._is_ready:
            self._advance(deadline, "the signal that every reader has joined")

    def next_kind(self, deadline: Deadline) -> int:
        """Waits for a message; its kind. take() gives it."""
        while not self._inbox:
            # Closed or lost, and nothing left in the socket: _advance says so at once.
            done = self._closed or self._lost
            self._advance(Deadline(0.0, _SETTINGS) if done else deadline, "a message")
        return self._inbox[0][0]

    def take(self) -> list[Any]:
        """The stream of the next message, and its buffers, writable and this process's own."""
        _, (stream, *buffers) = self._inbox.popleft()
        self._taken += 1
        if self._taken - self._acked >= self._ack_every:
            self._acked = self._taken
            self._socket.send(_ACK_FRAME.pack(_ACK, self._taken))
        return [stream.bytes, *(np.array(np.frombuffer(b.buffer, np.uint8)) for b in buffers)]

    def cancel(self) -> None:
        """Wakes a thread that waits in here; from then on every wait fails."""
        self._cancelled = True
        os.eventfd_write(self._stop, 1)

    def announce_close(self) -> None:
        """Leaves. The socket belongs to the thread that is inside: its end tells the writer."""

    def close(self) -> None:
        """Leaves: the writer waits for this reader no more."""
        if self._welcome and not self._lost:
            self._socket.send(_BYE, zmq.DONTWAIT)
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        # Unless it joined there may be nobody to send to.
        self._socket.close(linger=1000 if self._welcome and not self._lost else 0)
        self._context.term()
        os.close(self._stop)


_SETTINGS = Settings()
