"""multiprocessing.Queue. It has no broadcast: there is one for each reader."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

SPAWN = multiprocessing.get_context("spawn")


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
