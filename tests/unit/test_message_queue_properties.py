"""Any sequence of sends, reads, late joins, leaves, held views: against a plain model of the queue.

One process holds all ends and takes one step at a time with timeout=0, so that each step's outcome
is known: the message, or the reason why not.
"""

import gc

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from communicators.errors import CommTimeoutError, QueueClosedError
from communicators.message_queue import ends
from communicators.shm_broadcast import MessageQueue
from tests.unit.queue_processes import SETTINGS

CHUNK = 300
LIMIT = 100_000  # of unread bytes in blocks, here
#: Around every border: inline, chunk, out of band, half and twice the limit.
SIZES = st.sampled_from([0, 1, 100, 250, 320, 4000, 4096, 5000, 40_000, 60_000, 250_000])


def content(number: int, size: int) -> np.ndarray:
    return np.full(size, number % 251, np.uint8)


class QueueMachine(RuleBasedStateMachine):
    @initialize(n_reader=st.integers(1, 3), max_chunks=st.integers(1, 4))
    def make(self, n_reader: int, max_chunks: int) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(ends, "UNREAD_LIMIT_BYTES", LIMIT)
        self.chunks = max_chunks
        self.writer = MessageQueue(
            n_reader, n_reader, max_chunk_bytes=CHUNK, max_chunks=max_chunks, settings=SETTINGS
        )
        self.readers: dict[int, MessageQueue] = {}
        self.absent = set(range(n_reader))
        self.sent: list[tuple[int, int]] = []  # (number, size)
        self.read = dict.fromkeys(range(n_reader), 0)
        self.held: list[tuple[np.ndarray, int]] = []
        self.closed = False

    def teardown(self) -> None:
        if hasattr(self, "writer"):
            self.held.clear()
            for reader in self.readers.values():
                reader.close()
            self.writer.close()
            self.patch.undo()

    @rule(data=st.data())
    @precondition(lambda self: self.absent and not self.closed)
    def join(self, data: st.DataObject) -> None:
        rank = data.draw(st.sampled_from(sorted(self.absent)))
        self.absent.remove(rank)
        handle = self.writer.export_handle()
        self.readers[rank] = MessageQueue.create_from_handle(handle, rank, settings=SETTINGS)

    @rule(size=SIZES)
    @precondition(lambda self: not self.closed)
    def send(self, size: int) -> None:
        number = len(self.sent)
        try:
            self.writer.enqueue((number, content(number, size)), timeout=0)
        except CommTimeoutError:
            # Only a message that somebody has not read may stand in the way.
            assert min(self.read.values()) < len(self.sent)
            return
        except QueueClosedError:
            assert not self.read, "readers are left"
            return
        self.sent.append((number, size))
        if self.read:
            oldest = min(self.read.values())
            # A reader may have taken some ahead; a slot and a batch are all that it can hold.
            assert len(self.sent) - oldest <= self.chunks + 64

    @rule(data=st.data(), copy=st.booleans(), hold=st.booleans())
    @precondition(lambda self: self.readers)
    def receive(self, data: st.DataObject, copy: bool, hold: bool) -> None:
        rank = data.draw(st.sampled_from(sorted(self.readers)))
        due = self.read[rank]
        if due == len(self.sent):
            expected = QueueClosedError if self.closed else CommTimeoutError
            with pytest.raises(expected):
                self.readers[rank].dequeue(timeout=0)
            return
        number, array = self.readers[rank].dequeue(timeout=0, copy=copy)
        assert (number, array.size) == self.sent[due]
        assert np.array_equal(array, content(number, array.size))
        self.read[rank] += 1
        if hold:
            self.held.append((array, number))

    @rule()
    @precondition(lambda self: self.held)
    def let_go(self) -> None:
        self.held.pop(0)
        gc.collect(0)

    @rule(data=st.data())
    @precondition(lambda self: self.readers)
    def leave(self, data: st.DataObject) -> None:
        rank = data.draw(st.sampled_from(sorted(self.readers)))
        self.readers.pop(rank).close()
        del self.read[rank]

    @rule()
    @precondition(lambda self: not self.closed and len(self.sent) > 20)
    def close(self) -> None:
        self.writer.close()
        self.closed = True
        for rank in self.absent:
            del self.read[rank]

    @invariant()
    def held_views_never_change(self) -> None:
        for array, number in getattr(self, "held", []):
            assert np.array_equal(array, content(number, array.size))


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(
    max_examples=60,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
