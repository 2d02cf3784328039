"""MessageQueue: one writer sends objects to every reader, on this host and on others.

Readers on the writer's host share a ring in memory with it (native/shm/ring.h); readers on other
hosts are served over ZeroMQ (message_queue/wire.py). Every reader gets every message, in order,
once. A small message is copied into a slot of the ring; large buffers (numpy arrays, CPU tensors)
and long pickles go into a block of the ring's arena, one for each message, where
`dequeue(copy=False)` lets a reader use them in place.

Every blocking call takes `timeout`, in seconds; None is COMMUNICATORS_TIMEOUT_S, `math.inf` waits
as long as the other side lives. CommTimeoutError names who is late; PeerDiedError says that a
process is gone; QueueClosedError that the other side, or another thread of this one, has closed the
queue.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from .errors import InvalidArgumentError, RefusedError
from .message_queue.blocks import read_block, write_block
from .message_queue.codec import RENEW_BYTES, Encoder, cannot_pickle, decode
from .message_queue.deadline import Deadline
from .message_queue.ends import RingReader, RingWriter
from .message_queue.handle import VERSION, Handle, join_ring
from .message_queue.lifetime import QueueEnd
from .message_queue.native_ring import BLOCK, INLINE, RAW, api
from .message_queue.process import pid_space, start_time
from .message_queue.ring import ShmRingBuffer
from .settings import Settings

if TYPE_CHECKING:
    import torch.distributed as dist

    from .group import Group
    from .message_queue.remote_reader import RemoteReader
    from .message_queue.remote_writer import RemoteWriter

__all__ = ["Handle", "MessageQueue", "ShmRingBuffer"]


class MessageQueue(QueueEnd):
    """A broadcast queue. The constructor makes the writing end; readers use create_from_handle.

    Args:
        n_reader: how many readers there are, all told; a message is kept until all have it.
        n_local_reader: how many of them run on this host (up to 64).
        local_reader_ranks: the ranks of the local readers; default 0..n_local_reader-1.
        max_chunk_bytes: messages up to this size travel in a slot, larger ones in the arena.
        max_chunks: slots of the ring: so many messages may be unread before enqueue waits.
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
        max_chunks: int = 10,
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
        writer: RingWriter | None = None
        remote: RemoteWriter | None = None
        if n_local_reader:
            buffer = ShmRingBuffer(n_local_reader, max_chunk_bytes, max_chunks)
            writer = RingWriter(buffer, list(ranks), settings)
        if n_reader > n_local_reader:
            from .message_queue.remote_writer import RemoteWriter  # needs pyzmq, so only here

            remote = RemoteWriter(n_reader - n_local_reader, max_chunks, connect_ip, settings)
        if writer is not None and remote is not None:
            writer.others_left, remote.others_left = remote.any_left, writer.any_left
        handle = Handle(
            version=VERSION,
            n_reader=n_reader,
            local_reader_ranks=tuple(ranks),
            max_chunk_bytes=max_chunk_bytes,
            max_chunks=max_chunks,
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
        # Read from the ring and not dequeued yet: decoded ones first, then those that are not.
        self._objects: deque[Any] = deque()
        self._ready: deque[memoryview] = deque()
        self._next = self._objects.popleft
        self._open([e for e in (writer, remote_writer, reader, remote_reader) if e is not None])
        self._sleepers = memoryview(bytes(8)).cast("Q")
        # What the short path of enqueue and dequeue needs, one look-up away. While it must not be
        # taken (closed, forked, remote readers), _ring is null and _inline_bytes -1.
        self._ring = ctypes.c_void_p()
        self._inline_bytes = -1
        if reader is not None:
            self._ring = ctypes.c_void_p(reader.handle)
            self._batch = memoryview(reader.taken.bytes).cast("B")
            self._ends_of = reader.taken.ends
        elif writer is not None:
            self._ring = ctypes.c_void_p(writer.handle)
            # A plain look at a word that readers change: a hint, which costs less than a call.
            begin = api().sleepers_offset()
            self._sleepers = writer.ring.view[begin : begin + 8].cast("Q")
            if remote_writer is None:
                self._inline_bytes = min(handle.max_chunk_bytes, RENEW_BYTES)
        self._try_write, self._take, self._nudge = api().try_write, api().take, api().nudge

    def _forget(self) -> None:
        self._ring = ctypes.c_void_p()
        self._inline_bytes = -1
        self._sleepers = memoryview(bytes(8)).cast("Q")
        self._objects.clear()
        self._ready.clear()

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
        from .message_queue.remote_reader import RemoteReader  # needs pyzmq, so only here

        remote = RemoteReader(
            handle.remote_address, handle.remote_key, rank, handle.max_chunks, settings
        )
        queue._set_up(handle, settings, remote_reader=remote)
        return queue

    @staticmethod
    def create_from_process_group(
        pg: dist.ProcessGroup | Group,
        max_chunk_bytes: int = 1 << 16,
        max_chunks: int = 10,
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
        from .message_queue.for_group import create_for_group

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
        if not self._acquire(False):
            self._wait_for_lock(Deadline(timeout, self._settings))
        try:
            if self._sleepers[0]:
                self._nudge(self._ring)
            try:
                self._dump(obj)
            except BaseException as error:
                self._clear_after(error, obj)
                raise
            self._clear_memo()
            parts = self._parts
            part = parts.pop()
            if not parts and not self._buffers:
                size = len(part)
                if size <= self._inline_bytes and self._try_write(self._ring, part, size):
                    return
            parts.append(part)
            self._send(Deadline(timeout, self._settings))
        finally:
            if self._parts and self._encoder is not None:  # Ctrl-C, between the lines above
                self._encoder.clear()
            self._release()

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
                if not buffers and size <= self._handle.max_chunk_bytes:
                    self._try_write(self._ring, b"".join(parts), size)
                else:
                    write_block(self._writer, parts, buffers, deadline)
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
        if self._objects:  # that came together, and were decoded then
            try:
                return self._next()
            except IndexError:
                pass  # another thread was quicker
        if not self._acquire(False):
            self._wait_for_lock(Deadline(timeout, self._settings))
        try:
            if self._objects:  # another thread has brought some
                return self._next()
            if self._ready:
                return decode(self._ready.popleft())
            if self._reader is None or not self._ring:
                return self._receive(Deadline(timeout, self._settings))
            taken = self._take(self._ring)
            if taken == 0:
                deadline = Deadline(timeout, self._settings)
                while taken == 0:
                    self._reader.wait(deadline)
                    taken = self._take(self._ring)
            if taken == 1:
                return decode(self._batch)  # a pickle says itself where it ends
            if taken < 0:
                return self._read_in_place(copy)
            self._keep(taken)
            self._decode_ahead()
            return self._next() if self._objects else decode(self._ready.popleft())
        finally:
            self._release()

    def _decode_ahead(self) -> None:
        """Decodes what came together: most of the cost of a call is paid once.

        One that cannot be decoded, and those behind it, wait for their turn: it may have to do
        with what the program does with the messages before.
        """
        ready, add, loads = self._ready, self._objects.append, pickle.loads
        with contextlib.suppress(Exception):
            while ready:
                add(loads(ready[0]))
                ready.popleft()

    def _read_in_place(self, copy: bool) -> Any:
        reader = self._reader
        assert reader is not None
        if reader.taken.kind == BLOCK:
            return read_block(reader, copy)
        if reader.taken.kind == RAW:
            raise InvalidArgumentError(_RAW)
        begin = reader.taken.offset
        try:
            with reader.ring.view[begin : begin + reader.taken.size] as stream:
                return decode(stream)
        finally:
            api().done(reader.handle)

    def _receive(self, deadline: Deadline) -> Any:
        """dequeue() of a remote reader."""
        self._check_usable()
        if self._remote_reader is None:
            raise InvalidArgumentError("dequeue(): this is the writer's end of the queue")
        if self._remote_reader.next_kind(deadline) == RAW:
            raise InvalidArgumentError(_RAW)
        stream, *buffers = self._remote_reader.take()
        return decode(stream, buffers)

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
            has_slot = self._writer is not None and self._writer.wait_for_slot(deadline)
            if self._writer is None or not has_slot:
                chunk = memoryview(bytearray(size))
            else:
                begin = api().slot_payload(self._ring) - self._writer.ring.base
                chunk = self._writer.ring.view[begin : begin + size]
            with chunk:
                yield chunk
                if self._remote_writer is not None:
                    self._remote_writer.send(RAW, [bytes(chunk)], [])
            if has_slot:
                api().publish(self._ring, RAW, size, 0)

    @contextlib.contextmanager
    def acquire_read(self, timeout: float | None = None) -> Iterator[memoryview]:
        """The next chunk, which acquire_write() wrote; the writer may reuse it afterwards."""
        with self._locked(Deadline(timeout, self._settings)) as deadline:
            if self._remote_reader is not None:
                if self._remote_reader.next_kind(deadline) != RAW:
                    raise InvalidArgumentError(_NOT_RAW)
                with memoryview(self._remote_reader.take()[0]) as chunk:
                    yield chunk
                return
            reader = self._reader
            if reader is None:
                raise InvalidArgumentError("acquire_read(): this is the writer's end of the queue")
            if self._objects or self._ready:
                raise InvalidArgumentError(_NOT_RAW)
            while (taken := self._take(self._ring)) == 0:
                reader.wait(deadline)
            if taken > 0:
                self._keep(taken)
            if taken > 0 or reader.taken.kind != RAW:
                raise InvalidArgumentError(_NOT_RAW)
            begin = reader.taken.offset
            try:
                with reader.ring.view[begin : begin + reader.taken.size] as chunk:
                    yield chunk
            finally:
                api().done(reader.handle)

    def _keep(self, taken: int) -> None:
        """Lines up the messages that take() copied."""
        begin = 0
        for end in self._ends_of[:taken]:
            self._ready.append(self._batch[begin:end])
            begin = end


def _not_a_writer(obj: Any) -> None:
    raise InvalidArgumentError("enqueue(obj): this is a reader's end of the queue")


_RAW = "dequeue(): the next message was written by acquire_write(); acquire_read() reads it"
_NOT_RAW = "acquire_read(): the next message was written by enqueue(); dequeue() reads it"
