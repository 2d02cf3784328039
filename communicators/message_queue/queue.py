"""MessageQueue: one writer sends objects to every reader, on this host and on others.

Readers on the writer's host share a ring in memory with it (native/shm/ring.h); readers on other
hosts are served over ZeroMQ (message_queue/wire.py). Every reader gets every message, in order,
once. A small message lies in a slot of the ring, plain data (see native_end.py) in an encoding of
its own, anything else pickled; large buffers (numpy arrays, CPU tensors) and long pickles go into a
block of the ring's arena, one for each message, where `dequeue(copy=False)` lets a reader use them
in place.

Every blocking call takes `timeout`, in seconds; None is COMMUNICATORS_TIMEOUT_S, `math.inf` waits
as long as the other side lives. CommTimeoutError names who is late; PeerDiedError says that a
process is gone; QueueClosedError that the other side, or another thread of this one, has closed the
queue.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..errors import InvalidArgumentError, RefusedError
from ..settings import Settings
from .blocks import read_block, write_block
from .chunks import new_chunk, next_chunk, next_remote_chunk
from .codec import RENEW_BYTES, Encoder, cannot_pickle, decode
from .deadline import LOOK_S, Deadline
from .ends import RingReader, RingWriter
from .handle import VERSION, Handle, join_ring
from .lifetime import QueueEnd
from .native_end import FULL, NOT_APPLICABLE, NOTHING, SENT, reader_end, writer_end
from .native_ring import IN_PLACE, INLINE, RAW, RAW_BLOCK
from .process import pid_space, start_time
from .ring import ShmRingBuffer

if TYPE_CHECKING:
    import torch.distributed as dist

    from ..groups.group import Group
    from .remote_reader import RemoteReader
    from .remote_writer import RemoteWriter

__all__ = ["Handle", "MessageQueue", "ShmRingBuffer"]


class MessageQueue(QueueEnd):
    """A broadcast queue. The constructor makes the writing end; readers use create_from_handle.

    Args:
        n_reader: how many readers there are, all told; a message is kept until all have it.
        n_local_reader: how many of them run on this host (up to 64).
        local_reader_ranks: the ranks of the local readers; default 0..n_local_reader-1.
        max_chunk_bytes: the size of acquire_write()'s chunks. No memory is set aside for it:
            messages of up to 64 KiB of it travel in a slot, and what is larger in the arena.
        max_chunks: slots of the ring: so many messages may be unread before enqueue waits. Default:
            256 here, which take memory as they are used, and 10 by a reader on another host.
            Messages of more than max_chunk_bytes, and arrays, wait sooner: see docs/design.md.
        connect_ip: the address of this host that is bound for remote readers; default loopback.

    The object belongs to the process that made it. Threads may share it: a call holds the one lock
    of its end. A forked child that inherits it cannot use it; it joins with the handle.
    """

    def __init__(
        self,
        n_reader: int,
        n_local_reader: int,
        local_reader_ranks: list[int] | None = None,
        max_chunk_bytes: int = 1 << 16,
        max_chunks: int | None = None,
        connect_ip: str | None = None,
        *,
        settings: Settings | None = None,
    ) -> None:
        ranks = list(range(n_local_reader)) if local_reader_ranks is None else local_reader_ranks
        if n_reader < 1 or not 0 <= n_local_reader <= n_reader:
            raise InvalidArgumentError(
                f"MessageQueue(n_reader={n_reader}, n_local_reader={n_local_reader}): at least one "
                "reader, and no more local readers than readers, are expected"
            )
        if len(ranks) != n_local_reader or len(set(ranks)) != n_local_reader:
            raise InvalidArgumentError(
                f"MessageQueue(local_reader_ranks={ranks}): {n_local_reader} different ranks are "
                "expected, as n_local_reader says"
            )
        settings = settings if settings is not None else Settings.from_environment()
        # Processes that share few cores take turns: a turn's worth of small messages has to fit.
        chunks = 256 if max_chunks is None else max_chunks
        window = 10 if max_chunks is None else max_chunks
        writer: RingWriter | None = None
        remote: RemoteWriter | None = None
        if n_local_reader:
            buffer = ShmRingBuffer(n_local_reader, max_chunk_bytes, chunks)
            writer = RingWriter(buffer, list(ranks), settings)
        if n_reader > n_local_reader:
            from .remote_writer import RemoteWriter  # needs pyzmq, so only here

            remote = RemoteWriter(n_reader - n_local_reader, window, connect_ip, settings)
        if writer is not None and remote is not None:
            writer.others_left, remote.others_left = remote.any_left, writer.any_left
        handle = Handle(
            version=VERSION,
            n_reader=n_reader,
            local_reader_ranks=tuple(ranks),
            max_chunk_bytes=max_chunk_bytes,
            max_chunks=chunks,
            remote_window=window,
            writer_pid=os.getpid(),
            writer_started=start_time(os.getpid()) or 0,
            pid_space=pid_space(),
            ring=writer.ring.name if writer is not None else None,
            remote_address=remote.address if remote is not None else None,
            remote_key=remote.key if remote is not None else b"",
        )
        self._set_up(handle, settings, writer=writer, remote_writer=remote)

    def _set_up(
        self,
        handle: Handle,
        settings: Settings,
        *,
        writer: RingWriter | None = None,
        remote_writer: RemoteWriter | None = None,
        reader: RingReader | None = None,
        remote_reader: RemoteReader | None = None,
    ) -> None:
        self._handle = handle
        self._settings = settings
        self._writer = writer
        self._remote_writer = remote_writer
        self._reader = reader
        self._remote_reader = remote_reader
        self._encoder = Encoder() if writer or remote_writer else None
        self._parts: list[Any] = []
        self._buffers: list[memoryview] = []
        self._dump: Callable[[Any], None] = _not_a_writer
        if self._encoder is not None:
            self._parts, self._buffers = self._encoder.parts, self._encoder.buffers
            self._dump, self._clear_memo = self._encoder.dump, self._encoder.clear_memo
        ends = [e for e in (writer, remote_writer, reader, remote_reader) if e is not None]
        self._end: Any = None  # of the ring
        if writer is not None:
            self._end = writer_end(writer, is_only=remote_writer is None)
        elif reader is not None:
            self._end = reader_end(reader, settings.timeout_s)
        self._try_put: Callable[[Any], int] = _never_sent
        self._get: Callable[[float | None], Any] = _nothing
        self._waited: Callable[[], float] = float
        if writer is not None:
            self._try_put = self._end.try_put
        elif reader is not None:
            self._get, self._waited = self._end.get, self._end.waited
        if self._end is not None:
            self._open(ends, self._end, self._end.detach)
        else:
            self._open(ends, threading.Lock(), _no_memory)

    # --- joining --------------------------------------------------------------------------------

    def export_handle(self) -> Handle:
        """What readers join with; it can be pickled, and is valid while the writer lives."""
        return self._handle

    @staticmethod
    def create_from_handle(
        handle: Handle, rank: int, *, settings: Settings | None = None
    ) -> MessageQueue:
        """Joins as reader `rank`, once.

        A rank of `local_reader_ranks` reads from shared memory, any other over TCP.
        Raises InvalidArgumentError (no handle, joined before), RefusedError (another version,
        another user, not on the writer's host), PeerDiedError (its writer is gone).
        """
        if not isinstance(handle, Handle):
            raise InvalidArgumentError(
                f"create_from_handle(handle): what export_handle() returned is expected, got a "
                f"{type(handle).__name__}"
            )
        if handle.version != VERSION:
            raise RefusedError(
                f"create_from_handle(handle): the handle is of version {handle.version}, this "
                f"library reads version {VERSION}; writer and readers need the same release"
            )
        settings = settings if settings is not None else Settings.from_environment()
        queue = MessageQueue.__new__(MessageQueue)
        if rank in handle.local_reader_ranks:
            queue._set_up(handle, settings, reader=join_ring(handle, rank, settings))
            return queue
        if handle.remote_address is None:
            raise InvalidArgumentError(
                f"create_from_handle(handle, rank={rank}): the queue has local readers only, of "
                f"ranks {', '.join(map(str, handle.local_reader_ranks))}"
            )
        from .remote_reader import RemoteReader  # needs pyzmq, so only here

        remote = RemoteReader(
            handle.remote_address, handle.remote_key, rank, handle.remote_window, settings
        )
        queue._set_up(handle, settings, remote_reader=remote)
        return queue

    @staticmethod
    def create_from_process_group(
        pg: dist.ProcessGroup | Group,
        max_chunk_bytes: int = 1 << 16,
        max_chunks: int | None = None,
        writer_rank: int = 0,
        *,
        connect_ip: str | None = None,
        timeout: float | None = None,
    ) -> MessageQueue:
        """The queue from rank `writer_rank` of a group to its other ranks. Collective.

        Ranks on the writer's host get shared memory, the others TCP, to `connect_ip` (default: the
        writer's address on the way to the group's store). Ready when it returns. If one rank cannot
        join, all raise RefusedError with its reason.
        """
        from .for_group import create_for_group

        return create_for_group(
            pg, max_chunk_bytes, max_chunks, writer_rank, connect_ip=connect_ip, timeout=timeout
        )

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Returns once every reader has joined. Collective: writer and readers call it."""
        with self._locked(Deadline(timeout, self._settings)) as deadline:
            if self._writer is not None:
                self._writer.wait_until_ready(deadline)
            if self._remote_writer is not None:
                self._remote_writer.wait_until_ready(deadline)
                self._remote_writer.set_ready()
            if self._writer is not None:
                self._writer.set_ready()
            if self._reader is not None:
                self._reader.wait_until_ready(deadline)
            if self._remote_reader is not None:
                self._remote_reader.wait_until_ready(deadline)

    # --- objects --------------------------------------------------------------------------------

    def enqueue(self, obj: Any, timeout: float | None = None) -> None:
        """Sends `obj` to every reader; returns once it is stored, before they have read it.

        The object may be changed afterwards. Raises InvalidArgumentError if it cannot be pickled,
        CommTimeoutError naming the reader whose unread messages leave no room: then no reader gets
        the message, and the queue can be used on.
        """
        sent = self._try_put(obj)
        if sent != SENT:
            self._enqueue(obj, timeout, sent)

    def _enqueue(self, obj: Any, timeout: float | None, why: int) -> None:
        """What try_put() did not send."""
        self._check_usable()
        if not self._acquire(False):
            self._wait_for_lock(Deadline(timeout, self._settings))
        try:
            deadline = None
            if why != NOT_APPLICABLE:
                deadline = Deadline(timeout, self._settings)
                if self._put(obj, deadline):
                    return
            try:
                self._dump(obj)
            except BaseException as error:
                self._clear_after(error, obj)
                raise
            self._clear_memo()
            parts = self._parts
            if len(parts) == 1 and not self._buffers and self._end is not None:
                part = parts.pop()
                if len(part) <= RENEW_BYTES and self._end.put_pickle(part):
                    return
                parts.append(part)
            self._send(deadline or Deadline(timeout, self._settings))
        finally:
            if self._parts and self._encoder is not None:  # Ctrl-C, between the lines above
                self._encoder.clear()
            self._release()

    def _put(self, obj: Any, deadline: Deadline) -> bool:
        """Waits for a slot; whether `obj` was sent: no, if it is to be pickled."""
        while (sent := self._end.put(obj)) == FULL:
            assert self._writer is not None
            if not self._writer.wait_for_slot(deadline):
                return False
        return bool(sent == SENT)

    def _clear_after(self, error: BaseException, obj: Any) -> None:
        """What a dump() that failed, or was interrupted, left must not be in the next message."""
        if self._encoder is not None:
            self._encoder.clear()
            if isinstance(error, Exception):
                raise cannot_pickle(obj, error) from error

    def _send(self, deadline: Deadline) -> None:
        """The long way: waits for room everywhere first, so that all readers get it or none."""
        assert self._encoder is not None
        parts, buffers = self._parts, self._buffers
        try:
            self._check_usable()
            if self._remote_writer is not None:
                self._remote_writer.wait_for_room(deadline)
            size = sum(memoryview(part).nbytes for part in parts)
            if size > RENEW_BYTES:
                self._encoder.renew()
                self._dump, self._clear_memo = self._encoder.dump, self._encoder.clear_memo
            if self._writer is not None and self._writer.wait_for_slot(deadline):
                if not buffers and size <= self._writer.ring.slot_bytes:
                    self._writer.write(b"".join(parts))
                else:
                    in_slot_count = not buffers and size <= self._handle.max_chunk_bytes
                    write_block(self._writer, parts, buffers, deadline, in_slot_count)
            if self._remote_writer is not None:
                self._remote_writer.send(INLINE, parts, buffers)
        finally:
            self._encoder.clear()

    def dequeue(self, timeout: float | None = None, copy: bool = True) -> Any:
        """The next object.

        Args:
            copy: False leaves large numpy arrays (read-only) and CPU tensors (not to be written
                to) in the shared memory; the writer reuses it once the last of them is gone.

        Raises CommTimeoutError when no message arrived; QueueClosedError or PeerDiedError when the
        writer has closed the queue or died, after everything that it sent was read.
        """
        obj = self._get(timeout)
        return self._dequeue(timeout, copy) if obj is NOTHING else obj

    def _dequeue(self, timeout: float | None, copy: bool) -> Any:
        """What get() did not find."""
        self._check_usable()
        deadline = Deadline(timeout, self._settings, self._waited())
        if not self._acquire(False):
            self._wait_for_lock(deadline)
        try:
            reader = self._reader
            if reader is None:
                return self._receive(deadline)
            again = False
            while True:
                found = self._end.receive(deadline.slice_ns(LOOK_S), again)
                if type(found) is tuple:
                    return found[0]
                if found == IN_PLACE:
                    return self._read_in_place(copy)
                self._check_usable()
                reader.check(found, deadline)
                again = True
        finally:
            self._release()

    def _read_in_place(self, copy: bool) -> Any:
        reader = self._reader
        assert reader is not None
        if reader.taken.kind in (RAW, RAW_BLOCK):
            raise InvalidArgumentError(_RAW)
        return read_block(reader, copy)

    def _receive(self, deadline: Deadline) -> Any:
        """dequeue() of a remote reader."""
        self._check_usable()
        if self._remote_reader is None:
            raise InvalidArgumentError("dequeue(): this is the writer's end of the queue")
        if self._remote_reader.next_kind(deadline) == RAW:
            raise InvalidArgumentError(_RAW)
        stream, *buffers = self._remote_reader.next_message()
        try:
            obj = decode(stream, buffers)
        except KeyboardInterrupt:
            raise  # the message stays the next one
        except BaseException:
            self._remote_reader.used_up()
            raise
        self._remote_reader.used_up()
        return obj

    @property
    def rejected(self) -> int:
        """On the writer: connections and frames at its TCP port that were not a reader's."""
        return self._remote_writer.rejected if self._remote_writer is not None else 0

    def broadcast_object(self, obj: Any = None, timeout: float | None = None) -> Any:
        """The writer sends `obj` and returns it; a reader returns what it received."""
        if self._encoder is None:
            return self.dequeue(timeout)
        self.enqueue(obj, timeout)
        return obj

    # --- bytes ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def acquire_write(self, timeout: float | None = None) -> Iterator[memoryview]:
        """A chunk of `max_chunk_bytes` to write to; sent when the context ends without an error."""
        with self._locked(Deadline(timeout, self._settings)) as deadline:
            if self._encoder is None:
                raise InvalidArgumentError("acquire_write(): this is a reader's end of the queue")
            size = self._handle.max_chunk_bytes
            if self._remote_writer is not None:
                self._remote_writer.wait_for_room(deadline)
            chunks: Any = contextlib.nullcontext(memoryview(bytearray(size)))
            if self._writer is not None and self._writer.wait_for_slot(deadline):
                chunks = new_chunk(self._writer, size, deadline)
            with chunks as chunk:
                yield chunk
                if self._remote_writer is not None:
                    self._remote_writer.send(RAW, [bytes(chunk)], [])

    @contextlib.contextmanager
    def acquire_read(self, timeout: float | None = None) -> Iterator[memoryview]:
        """The next chunk, which acquire_write() wrote; the writer may reuse it afterwards."""
        with self._locked(Deadline(timeout, self._settings)) as deadline:
            if self._remote_reader is not None:
                chunks = next_remote_chunk(self._remote_reader, deadline)
            elif self._reader is not None:
                chunks = next_chunk(self._reader, self._end, deadline)
            else:
                raise InvalidArgumentError("acquire_read(): this is the writer's end of the queue")
            with chunks as chunk:
                yield chunk


def _not_a_writer(obj: Any) -> None:
    raise InvalidArgumentError("enqueue(obj): this is a reader's end of the queue")


def _never_sent(obj: Any) -> int:
    return NOT_APPLICABLE


def _nothing(timeout: float | None) -> Any:
    return NOTHING


def _no_memory() -> None:
    """Ends of other hosts have none that is shared."""


_RAW = "dequeue(): the next message was written by acquire_write(); acquire_read() reads it"
