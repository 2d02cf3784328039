"""A reader on another host than the writer's; wire.py has the protocol."""

from __future__ import annotations

import math
import os
from collections import deque
from typing import Any

import numpy as np
import zmq
from zmq.utils.monitor import recv_monitor_message

from ..errors import (
    CommTimeoutError,
    CommunicatorError,
    InvalidArgumentError,
    PeerDiedError,
    QueueClosedError,
    RefusedError,
)
from ..settings import Settings
from .deadline import LOOK_S, Deadline
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
    KEY_BYTES,
    READY,
    REFUSED,
    WELCOME,
    nobody_listens,
    open_socket,
)


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
        self._gone = False
        self._context = zmq.Context()
        self._socket = open_socket(self._context, zmq.DEALER, address)
        self._socket.curve_publickey, self._socket.curve_secretkey = zmq.curve_keypair()
        self._socket.curve_serverkey = key[:KEY_BYTES]
        self._monitor = self._socket.get_monitor_socket(
            BROKEN_HANDSHAKE | zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED
        )
        self._socket.connect(address)
        self._socket.send(HELLO_FRAME.pack(HELLO, rank, key[KEY_BYTES:]))
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._poller = zmq.Poller()
        for item in (self._socket, self._monitor, self._stop):
            self._poller.register(item, zmq.POLLIN)

    def _advance(self, deadline: Deadline, waiting_for: str) -> None:
        """Waits for one frame or event, and handles it."""
        # Closed or lost: what is left in the socket, and then the error, at once.
        left = 0.0 if self._closed or self._lost else min(deadline.left(), LOOK_S)
        ready = dict(self._poller.poll(math.ceil(left * 1e3)))
        if self._cancelled:
            raise QueueClosedError("message queue: this end was closed while it waited")
        if self._socket in ready:
            self._handle(self._socket.recv_multipart(copy=False))
        elif self._monitor in ready:
            event = recv_monitor_message(self._monitor)["event"]
            # The handle was made once the writer listened. What came before is read first.
            self._gone |= not self._welcome and nobody_listens(self._address)
            self._lost |= self._gone or event != zmq.EVENT_CONNECT_RETRIED
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
        if self._gone:
            return PeerDiedError(
                f"message queue: nothing listens at {self._address} any more, where reader rank "
                f"{self.rank} was to join; the writer is gone"
            )
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
        if kind == DATA:
            _, number, message_kind = DATA_FRAME.unpack(header)
            if number != self._received:
                raise CommunicatorError(
                    f"message queue: reader rank {self.rank} received message {number} after "
                    f"{self._received - 1}"
                )
            self._received += 1
            self._inbox.append((message_kind, frames[1:]))
        elif kind == WELCOME:
            self._welcome = True
        elif kind == READY:
            self._is_ready = True
        elif kind == CLOSED:
            self._closed = True
        elif kind == REFUSED:
            raise InvalidArgumentError(
                f"create_from_handle(handle, rank={self.rank}): {frames[1].bytes.decode()}; every "
                "remote reader joins once, with a rank of its own"
            )

    def wait_until_ready(self, deadline: Deadline) -> None:
        """Returns once the writer has seen every reader."""
        while not self._is_ready:
            self._advance(deadline, "the signal that every reader has joined")

    def next_kind(self, deadline: Deadline) -> int:
        """Waits for a message; its kind. next_message() gives it, used_up() ends it."""
        while not self._inbox:
            self._advance(deadline, "a message")
        return self._inbox[0][0]

    def next_message(self) -> list[Any]:
        """The stream of the next message, and its buffers, writable and this process's own."""
        stream, *buffers = self._inbox[0][1]
        return [stream.bytes, *(np.array(np.frombuffer(b.buffer, np.uint8)) for b in buffers)]

    def used_up(self) -> None:
        """The next message is needed no more."""
        self._inbox.popleft()
        self._taken += 1
        if self._taken - self._acked >= self._ack_every:
            self._acked = self._taken
            self._socket.send(ACK_FRAME.pack(ACK, self._taken))

    def cancel(self) -> None:
        """Wakes a thread that waits in here; from then on every wait fails."""
        self._cancelled = True
        os.eventfd_write(self._stop, 1)

    def announce_close(self) -> None:
        """Leaves. The socket belongs to the thread that is inside: its end tells the writer."""

    def close(self) -> None:
        """Leaves: the writer waits for this reader no more."""
        if self._welcome and not self._lost:
            self._socket.send(BYE, zmq.DONTWAIT)
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        # Unless it joined there may be nobody to send to.
        self._socket.close(linger=1000 if self._welcome and not self._lost else 0)
        self._context.term()
        os.close(self._stop)
