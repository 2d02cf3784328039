"""Many messages of all sizes with checksums; for more, scripts/bench/run queue --soak."""

import os
import zlib

import numpy as np

from communicators.shm_broadcast import MessageQueue
from tests.unit.queue_processes import local_queue, readers

MESSAGES = 60_000


def size_of(number: int) -> int:
    """Mostly small; some as large as a chunk, some larger."""
    if number % 500 == 0:
        return number * 31 % 300_000
    return number * 7 % 20_000 if number % 50 == 0 else number % 64


def _check_all(queue: MessageQueue) -> int:
    queue.wait_until_ready()
    for number in range(MESSAGES):
        got, crc, data = queue.dequeue(copy=bool(number & 1))
        assert got == number
        assert memoryview(data).nbytes == size_of(number)
        assert zlib.crc32(data) == crc
    return MESSAGES


def test_nothing_is_lost_torn_or_out_of_order() -> None:
    payload = os.urandom(300_000)
    queue = local_queue(3, max_chunk_bytes=1 << 14)
    with readers(queue, [0, 1, 2], _check_all) as made:
        queue.wait_until_ready()
        for number in range(MESSAGES):
            data = payload[: size_of(number)]
            obj = np.frombuffer(data, np.uint8) if number % 500 == 0 else data
            queue.enqueue((number, zlib.crc32(data), obj))
        assert [reader.result() for reader in made] == [MESSAGES] * 3
