"""The shared-memory ring of MessageQueue, seen from Python: its memory, its writer, its readers.

The protocol is in native/shm/ring.h, with its state table. This file maps the memory, turns waits
into deadlines and errors, and notices processes that are gone.

The memory is a memfd: it has no name, so nothing can be left behind, and it does not count against
the size of /dev/shm, which containers often set to 64 MB. A process that comes later opens
/proc/<pid of the writer>/fd/<n>: that needs no server and no thread in the writer, works with spawn
and fork alike, is refused by the kernel to other users, and ends with the writer. The file is as
large as the machine's memory and sparse, so that large messages find room without a second file;
what was never written to takes none.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import math
import mmap
import os
import pickle
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

from .bindings.ring_api import Taken, api
from .errors import (
    CommTimeoutError,
    CommunicatorError,
    InvalidArgumentError,
    PeerDiedError,
    QueueClosedError,
    RefusedError,
)
from .process import Process, start_time
from .settings import Settings

MAX_READERS = 64
BLOCK_HEADER_BYTES = 64
INLINE, RAW, BLOCK = 1, 2, 3  # SlotKind
ABSENT, JOINED, LEFT, DEAD = range(4)  # ReaderState
READY, TIMED_OUT, CLOSED, INTERRUPTED, CANCELLED, NUDGED, PEER_GONE = range(7)  # WaitResult
FIRST, AGAIN, AFTER_NUDGE = range(3)  # WaitMode
MUST_WAIT, NO_ROOM, NO_MEMORY = -1, -2, -3  # allocate_block
_PUBLISHED, _JOINED_COUNT, _READY_FLAG = range(3)  # communicators_ring_word
_F_ADD_SEALS, _SEAL_SHRINK, _SEAL_GROW = 1033, 2, 4  # <linux/fcntl.h>

#: A writer that waits looks this often, in seconds, whether the readers still run: so long may a
#: death go unnoticed. (A reader looks as often, in native code: kLivenessNs.)
LIVENESS_S = 0.05
#: A reader comes back to Python this often, for signals that another thread of the process took.
_SIGNALS_S = 0.5
#: What a reader that was nudged unpickles, to have the code in the caches when the message comes.
_WARM_UP = pickle.dumps({"a": 1, "b": ["c", 2.0, None, True], "d": (b"e", {})}, 5)

#: Bytes of large messages that may wait to be read; a single message may be larger.
UNREAD_LIMIT_BYTES = 64 << 20


class Deadline:
    """A point in time until which something may wait; `seconds` None: the Settings' deadline."""

    def __init__(self, seconds: float | None, settings: Settings) -> None:
        self.seconds = settings.timeout_s if seconds is None else seconds
        if math.isnan(self.seconds) or self.seconds < 0:
            raise InvalidArgumentError(
                f"timeout={seconds}: seconds, 0 or more, are expected (inf waits as long as the "
                "other side lives)"
            )
        self._at = time.monotonic() + self.seconds

    def left(self) -> float:
        """Seconds, never negative."""
        return max(0.0, self._at - time.monotonic())

    def slice_ns(self, longest: float = LIVENESS_S) -> int:
        """How long one call into native code may wait, in nanoseconds."""
        return int(min(self.left(), longest) * 1e9)


class ShmRingBuffer:
    """The memory of a ring: `max_chunks` slots of `max_chunk_bytes`, and an arena behind them.

    Args:
        n_reader: readers of this host, 1 to 64.
        name: None makes new memory; the `name` of another ShmRingBuffer maps that one's, for as
            long as the process that made it lives and keeps it. Pickling keeps the name.

    Raises PeerDiedError when the maker of `name` is gone, RefusedError when this process may not
    open its files (another user's).
    """

    def __init__(
        self, n_reader: int, max_chunk_bytes: int, max_chunks: int, name: str | None = None
    ) -> None:
        if not 1 <= n_reader <= MAX_READERS or max_chunk_bytes < 1 or max_chunks < 1:
            raise InvalidArgumentError(
                f"ShmRingBuffer(n_reader={n_reader}, max_chunk_bytes={max_chunk_bytes}, "
                f"max_chunks={max_chunks}): 1 to {MAX_READERS} readers of one host and positive "
                "sizes are expected"
            )
        self.n_reader = n_reader
        self.max_chunk_bytes = max_chunk_bytes
        self.max_chunks = max_chunks
        self.is_creator = name is None
        self.name = self._create() if name is None else self._open(name)
        self.view = memoryview(self._map)

    def _create(self) -> str:
        arena = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        size = api().bytes(self.n_reader, self.max_chunks, self.max_chunk_bytes, arena)
        self.fd = os.memfd_create("message-queue", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size)
        fcntl.fcntl(self.fd, _F_ADD_SEALS, _SEAL_SHRINK | _SEAL_GROW)
        self._map_file(size)
        unique = secrets.token_bytes(16)
        sizes = (self.n_reader, self.max_chunks, self.max_chunk_bytes, arena)
        api().create(self.base, *sizes, unique, 0)
        return f"{os.getpid()}/{self.fd}/{unique.hex()}"

    def _open(self, name: str) -> str:
        try:
            pid, number, unique = name.split("/")
            path = f"/proc/{int(pid)}/fd/{int(number)}"
            wanted = bytes.fromhex(unique)
        except ValueError:
            raise InvalidArgumentError(
                f"ShmRingBuffer(name={name!r}): the name of another ShmRingBuffer is expected"
            ) from None
        gone = PeerDiedError(
            f"message queue: process {pid}, which made the queue of this handle, is gone or has "
            "closed it"
        )
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except PermissionError as error:
            raise RefusedError(
                f"message queue: this process may not open the memory of process {pid}: {error}; "
                "writer and readers of one host run as one user"
            ) from error
        except OSError as error:
            raise gone from error
        try:
            size = os.fstat(self.fd).st_size
            if size < mmap.PAGESIZE:
                raise gone
            self._map_file(size)
            found = api().check(self.base, wanted)
            if found == 2:
                raise RefusedError(
                    f"message queue: process {pid} runs another version of this library, with "
                    "another layout of the ring"
                )
            if found != 0:  # that descriptor, or that pid, is something else by now
                raise gone
        except BaseException:
            self.close()
            raise
        return name

    def _map_file(self, size: int) -> None:
        self._map = mmap.mmap(self.fd, size)
        self.base: int = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def __reduce__(self) -> tuple[Any, ...]:
        sizes = (self.n_reader, self.max_chunk_bytes, self.max_chunks)
        return ShmRingBuffer, (*sizes, self.name)

    @contextlib.contextmanager
    def get_data(self, current_idx: int) -> Iterator[memoryview]:
        """The bytes of slot `current_idx`, for as long as the context lasts."""
        begin = api().slot_offset(self.base, current_idx % self.max_chunks)
        with self.view[begin : begin + self.max_chunk_bytes] as chunk:
            yield chunk

    @contextlib.contextmanager
    def get_metadata(self, current_idx: int) -> Iterator[memoryview]:
        """The flags of the message last written to slot `current_idx`: written, then a reader each.

        A snapshot derived from the ring's counters (the table in native/shm/ring.h): 1 and zeros is
        WRITTEN, ones is READ, all zeros is FREE.
        """
        published = api().word(self.base, _PUBLISHED) >> 1
        slot = current_idx % self.max_chunks
        behind = (published - 1 - slot) % self.max_chunks  # messages published after that one
        flags = bytearray(1 + self.n_reader)
        if published > behind:
            flags[0] = 1
            for reader in range(self.n_reader):
                unread = (published - self.reader_info(reader)[3]) % (1 << 31)
                flags[1 + reader] = unread <= behind
        yield memoryview(flags)

    def reader_info(self, reader: int) -> tuple[int, int, int, int]:
        """(state, pid, start time, messages read modulo 2^31) of a reader."""
        out = (ctypes.c_uint64 * 4)()
        api().reader_info(self.base, reader, out)
        state, pid, started, consumed = out
        return state, pid, started, consumed

    def close(self) -> None:
        """Unmaps it, now or when the last view of it is gone. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        # Views that somebody holds keep the mapping; it goes with the last one.
        with contextlib.suppress(BufferError, AttributeError):
            self.view.release()
            self._map.close()


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
        mode = FIRST
        while True:
            result = api().writer_wait(self.handle, deadline.slice_ns(), mode)
            if result == READY:
                return
            if result == CANCELLED:
                raise QueueClosedError("message queue: this end was closed while it waited")
            self.drop_dead()
            if result == TIMED_OUT and deadline.left() == 0.0:
                raise CommTimeoutError(f"message queue: {self._late(deadline)}")
            mode = AGAIN

    def wait_for_slot(self, deadline: Deadline) -> bool:
        """Waits until a slot may be written; False when nobody is left in this ring to read it."""
        while not api().has_slot(self.handle):
            self.wait(deadline)
            if not api().has_slot(self.handle):
                self.drop_dead()
                if not self.any_left():
                    return False
        return True

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

    def allocate(self, size: int, deadline: Deadline) -> int:
        """The offset of a block of `size` bytes in the region."""
        while True:
            block: int = api().allocate_block(self.handle, size)
            if block >= 0:
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
            joined = api().word(self.ring.base, _JOINED_COUNT)
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
            api().wait_word(self.ring.base, _JOINED_COUNT, joined, deadline.slice_ns())

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
        if not api().join(self.handle, pid, start_time(pid)):
            other = ring.reader_info(index)[1]
            api().reader_free(self.handle)
            raise InvalidArgumentError(
                f"create_from_handle(handle, rank={rank}): rank {rank} has joined this queue "
                f"before, as process {other}; a rank joins once"
            )
        self.taken = Taken.from_address(api().taken(self.handle))

    def wait(self, deadline: Deadline) -> None:
        """Returns once a message is there."""
        mode = FIRST
        while True:
            slice_ns = deadline.slice_ns(_SIGNALS_S)
            result = api().reader_wait(self.handle, slice_ns, mode, self._writer.fd)
            if result == READY:
                return
            mode = AGAIN
            if result == NUDGED:
                pickle.loads(_WARM_UP)
                mode = AFTER_NUDGE
            elif result == CLOSED:
                raise QueueClosedError(
                    f"message queue: the writer has closed it; rank {self.rank} has read everything"
                )
            elif result == CANCELLED:
                raise QueueClosedError("message queue: this end was closed while it waited")
            elif result == PEER_GONE:
                raise PeerDiedError(
                    f"message queue: the writer (process {self._writer.pid}) is gone; reader rank "
                    f"{self.rank} has read everything that it wrote"
                )
            elif result == TIMED_OUT and deadline.left() == 0.0:
                raise CommTimeoutError(
                    f"message queue: reader rank {self.rank} waited {deadline.seconds:g} s for a "
                    f"message from process {self._writer.pid}, which is alive"
                )

    def wait_until_ready(self, deadline: Deadline) -> None:
        """Returns once the writer has seen every reader."""
        while not api().word(self.ring.base, _READY_FLAG):
            if api().word(self.ring.base, _PUBLISHED) & 1:
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
            api().wait_word(self.ring.base, _READY_FLAG, 0, deadline.slice_ns())

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
