"""pyzmq PUB/SUB over ipc, without bounds on its queues, so that it loses nothing."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from typing import Any

import zmq


class PyZmq:
    name = "pyzmq"
    out_of_band = False

    def __init__(self, readers: int) -> None:
        self.directory = tempfile.TemporaryDirectory()
        address = f"ipc://{self.directory.name}/queue"
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.XPUB)
        self.socket.sndhwm = 0
        self.socket.bind(address)
        self.readers = readers
        self.for_reader = [(_pyzmq, address, self.out_of_band)] * readers

    def ready(self) -> None:
        self.socket.setsockopt(zmq.XPUB_VERBOSE, 1)
        for _ in range(self.readers):
            self.socket.recv()  # a subscription

    def send(self, obj: Any) -> None:
        if self.out_of_band:
            buffers: list[Any] = []
            stream = pickle.dumps(obj, protocol=5, buffer_callback=buffers.append)
            self.socket.send_multipart([stream, *buffers], copy=False)
        else:
            self.socket.send(pickle.dumps(obj, protocol=5))

    def close(self) -> None:
        self.context.destroy(linger=0)
        self.directory.cleanup()


class PyZmqOutOfBand(PyZmq):
    name = "pyzmq oob"
    out_of_band = True


def _pyzmq(address: str, out_of_band: bool) -> Callable[[], Any]:
    socket = zmq.Context().socket(zmq.SUB)
    socket.rcvhwm = 0
    socket.connect(address)
    socket.subscribe(b"")
    if not out_of_band:
        return lambda: pickle.loads(socket.recv())

    def receive() -> Any:
        stream, *buffers = socket.recv_multipart(copy=False)
        return pickle.loads(stream.buffer, buffers=[frame.buffer for frame in buffers])

    return receive
