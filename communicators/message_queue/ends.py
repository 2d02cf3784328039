"""The two ends of the shared-memory ring: waits with deadlines, and processes that are gone.

The protocol is in native/shm/ring.h, with its state table; the memory is that of ring.py.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

from ..errors import (
    CommTimeoutError,
    CommunicatorError,
    InvalidArgumentError,
    PeerDiedError,
    QueueClosedError,
)
from ..settings import Settings
from .deadline import LOOK_S, Deadline
from .native_ring import (
    ABSENT,
    CANCELLED,
    CLOSED,
    DEAD,
    JOINED,
    JOINED_COUNT,
    LEFT,
    MUST_WAIT,
    PEER_GONE,
    PUBLISHED,
    READY,
    READY_FLAG,
    TIMED_OUT,
    Taken,
    api,
)
from .process import Process, start_time
from .ring import ShmRingBuffer

#: Bytes of large messages that may wait to be read; a single message may be larger.
UNREAD_LIMIT_BYTES = 64 << 20


class RingWriter:
    """The writing end of a ring: waits for readers that live, gives up those that are gone."""

    def __init__(self, ring: ShmRingBuffer, ranks: list[int], settings: Settings) -> None:
        self.ring = ring
        self.ranks = ranks  # of the readers, as the caller names them
        self.handle: int = api().writer_open(
            ring.base,
            ring.fd,
            UNREAD_LIMIT_BYTES,
            settings.spin_us * 1000,
            settings.queue_spin_us * 1000,
        )
        self._processes: dict[int, Process] = {}
        self.others_left: Callable[[], bool] = lambda: False  # readers that are not in this ring

    def any_left(self) -> bool:
        """Whether a reader is there or still expected."""
        infos = (self.ring.reader_info(reader) for reader in range(self.ring.n_reader))
        return any(state in (ABSENT, JOINED) for state, *_ in infos)

    def drop_dead(self) -> None:
        """Lets go of readers whose process has ended. PeerDiedError if no other reader is left."""
        alive = 0
        died = []
        for reader in range(self.ring.n_reader):
            state, pid, started, _ = self.ring.reader_info(reader)
            process = self._processes.get(reader)
            if process is None and pid and started and state != DEAD:
                process = self._processes[reader] = Process(pid, started)
            if process is not None and process.gone:
                api().drop(self.handle, reader)
                state = DEAD if state != LEFT else LEFT
            alive += state in (ABSENT, JOINED)
            if state == DEAD:
                died.append(self.ranks[reader])
        if alive == 0 and not self.others_left():
            if died:
                raise PeerDiedError(
                    f"message queue: no reader is left; the process of rank "
                    f"{', '.join(map(str, died))} is gone"
                )
            raise QueueClosedError("message queue: every reader has closed it")

    def wait(self, deadline: Deadline) -> None:
        """Waits for the readers, as long as the last has_slot() or allocate_block() asked for."""
        again = False
        while True:
            result = api().writer_wait(self.handle, deadline.slice_ns(LOOK_S), again)
            if result == READY:
                return
            if result == CANCELLED:
                raise QueueClosedError("message queue: this end was closed while it waited")
            self.drop_dead()
            if result == TIMED_OUT and deadline.left() == 0.0:
                raise CommTimeoutError(f"message queue: {self._late(deadline)}")
            again = True

    def wait_for_slot(self, deadline: Deadline) -> bool:
        """Waits until a slot may be written; False when nobody is left in this ring to read it."""
        while not api().has_slot(self.handle):
            self.wait(deadline)
            if not api().has_slot(self.handle):
                self.drop_dead()
                if not self.any_left():
                    return False
        return True

    def write(self, stream: bytes) -> None:
        """Sends a pickle of up to ring.slot_bytes. A slot must be free."""
        api().try_write(ctypes.c_void_p(self.handle), stream, len(stream))

    def _late(self, deadline: Deadline) -> str:
        """Who is furthest behind, as a sentence."""
        sent = api().sent(self.handle)
        behind: dict[int, list[str]] = {}
        for reader, rank in enumerate(self.ranks):
            state, pid, _, read = self.ring.reader_info(reader)
            if state in (ABSENT, JOINED):
                who = (
                    f"rank {rank} (process {pid})" if pid else f"rank {rank}, which has not joined"
                )
                behind.setdefault((sent - read) % (1 << 31), []).append(who)
        most = max(behind, default=0)
        return (
            f"the writer waited {deadline.seconds:g} s for readers that have not read the last "
            f"{most} message{'s' if most != 1 else ''}: {', '.join(behind.get(most, []))}"
        )

    def allocate(self, size: int, deadline: Deadline, in_slot_count: bool = False) -> int:
        """The offset of a block of `size` bytes in the region.

        `in_slot_count`: a message within max_chunk_bytes, of which as many may be unread as there
        are slots. UNREAD_LIMIT_BYTES is for the others.
        """
        while True:
            block: int = api().allocate_block(self.handle, size, in_slot_count)
            if block >= 0:
                if api().backed_bytes(self.handle) > UNREAD_LIMIT_BYTES:
                    self.drop_dead()  # what the dead held as views need not be held any more
                return block
            if block == MUST_WAIT:
                self.wait(deadline)
                continue
            raise CommunicatorError(
                f"enqueue(obj): a message of {size} bytes finds no memory; "
                f"{api().backed_bytes(self.handle)} bytes of large messages are unread or held by "
                "views of dequeue(copy=False)"
            )

    def wait_until_ready(self, deadline: Deadline) -> None:
        """Returns once every reader has joined."""
        while True:
            joined = api().word(self.ring.base, JOINED_COUNT)
            infos = [self.ring.reader_info(reader) for reader in range(self.ring.n_reader)]
            if all(state != ABSENT for state, *_ in infos):
                return
            self.drop_dead()
            if deadline.left() == 0.0:
                late = [self.ranks[i] for i, info in enumerate(infos) if info[0] == ABSENT]
                raise CommTimeoutError(
                    f"message queue: the writer waited {deadline.seconds:g} s for reader rank "
                    f"{', '.join(map(str, late))} to join"
                )
            api().wait_word(self.ring.base, JOINED_COUNT, joined, deadline.slice_ns(LOOK_S))

    def set_ready(self) -> None:
        """Lets the readers' wait_until_ready return."""
        api().set_ready(self.ring.base)

    def cancel(self) -> None:
        """Wakes a thread of this process that waits in here; from then on every wait fails."""
        api().cancel_writer(self.handle)

    def announce_close(self) -> None:
        """Tells the readers that nothing more will come."""
        api().close(self.handle)

    def close(self) -> None:
        """The same, and gives the memory back."""
        self.announce_close()
        api().writer_free(self.handle)
        for process in self._processes.values():
            process.close()
        self.ring.close()


class RingReader:
    """One reading end of a ring."""

    def __init__(
        self, ring: ShmRingBuffer, index: int, rank: int, writer: Process, settings: Settings
    ) -> None:
        self.ring = ring
        self.index = index
        self.rank = rank
        self._writer = writer
        self.handle: int = api().reader_open(
            ring.base, index, settings.spin_us * 1000, settings.queue_spin_us * 1000
        )
        pid = os.getpid()
        if not api().join(self.handle, pid, start_time(pid) or 0):
            other = ring.reader_info(index)[1]
            api().reader_free(self.handle)
            raise InvalidArgumentError(
                f"create_from_handle(handle, rank={rank}): rank {rank} has joined this queue "
                f"before, as process {other}; a rank joins once"
            )
        self.taken = Taken.from_address(api().taken(self.handle))

    @property
    def writer_fd(self) -> int:
        """The pidfd of the writer's process."""
        return self._writer.fd

    def check(self, result: int, deadline: Deadline) -> None:
        """Raises, if a wait that ended so is not to be continued."""
        if result == CLOSED:
            raise QueueClosedError(
                f"message queue: the writer has closed it; rank {self.rank} has read everything"
            )
        if result == CANCELLED:
            raise QueueClosedError("message queue: this end was closed while it waited")
        if result == PEER_GONE:
            raise PeerDiedError(
                f"message queue: the writer (process {self._writer.pid}) is gone; reader rank "
                f"{self.rank} has read everything that it wrote"
            )
        if result == TIMED_OUT and deadline.left() == 0.0:
            raise CommTimeoutError(
                f"message queue: reader rank {self.rank} waited {deadline.seconds:g} s for a "
                f"message from process {self._writer.pid}, which is alive"
            )

    def wait_until_ready(self, deadline: Deadline) -> None:
        """Returns once the writer has seen every reader."""
        while not api().word(self.ring.base, READY_FLAG):
            if api().word(self.ring.base, PUBLISHED) & 1:
                raise QueueClosedError("message queue: the writer closed it before it was ready")
            if self._writer.gone:
                raise PeerDiedError(
                    f"message queue: the writer (process {self._writer.pid}) died before the queue "
                    "was ready"
                )
            if deadline.left() == 0.0:
                raise CommTimeoutError(
                    f"message queue: reader rank {self.rank} waited {deadline.seconds:g} s for the "
                    "writer and the other readers to be ready"
                )
            api().wait_word(self.ring.base, READY_FLAG, 0, deadline.slice_ns(LOOK_S))

    def cancel(self) -> None:
        """Wakes a thread of this process that waits in here; from then on every wait fails."""
        api().cancel_reader(self.handle)

    def announce_close(self) -> None:
        """Leaves: the writer waits for this reader no more."""
        api().leave(self.handle)

    def close(self) -> None:
        """The same, and gives the memory back."""
        self.announce_close()
        api().reader_free(self.handle)
        self._writer.close()
        self.ring.close()
