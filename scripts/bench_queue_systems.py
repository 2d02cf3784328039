"""What bench_queue compares: each system gives a writer's send(obj) and, in a reader, receive()."""

from __future__ import annotations

import functools
import multiprocessing
import pickle
import tempfile
from collections.abc import Callable
from typing import Any

import zmq

from communicators.shm_broadcast import MessageQueue

SPAWN = multiprocessing.get_context("spawn")


class Ours:
    name = "MessageQueue"

    def __init__(self, readers: int, copy: bool = True, **sizes: int) -> None:
        self.queue = MessageQueue(readers, readers, **sizes)
        self.send = self.queue.enqueue
        self.for_reader = [(_ours, self.queue.export_handle(), i, copy) for i in range(readers)]

    def ready(self) -> None:
        self.queue.wait_until_ready(60)

    def close(self) -> None:
        self.queue.close()


def _ours(handle: Any, rank: int, copy: bool) -> Callable[[], Any]:
    queue = MessageQueue.create_from_handle(handle, rank)
    queue.wait_until_ready(60)
    return queue.dequeue if copy else functools.partial(queue.dequeue, copy=False)


class Multiprocessing:
    name = "mp.Queue"

    def __init__(self, readers: int) -> None:
        self.queues = [SPAWN.Queue() for _ in range(readers)]
        self.for_reader = [(_multiprocessing, queue) for queue in self.queues]

    def send(self, obj: Any) -> None:
        for queue in self.queues:
            queue.put(obj)

    def ready(self) -> None:
        pass

    def close(self) -> None:
        for queue in self.queues:
            queue.close()
            queue.join_thread()


def _multiprocessing(queue: Any) -> Callable[[], Any]:
    return queue.get


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
