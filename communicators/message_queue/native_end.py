"""The per-message fast path of a ring's ends: native, with a fallback in Python.

The native ones (native/python) send and read plain data in one call each: None, bool, int, float,
str, bytes, list, tuple and dict, of exactly these types. They cannot be had where the interpreter
has no lock (its free-threaded builds do not load modules of the limited API) and where the library
was compiled without Python's headers; there the Python ones below pickle everything. Both can stand
at the two ends of one queue.
"""

from __future__ import annotations

import ctypes
import functools
import pickle
import threading
from collections import deque
from types import ModuleType
from typing import Any

from ..bindings import native
from . import plain
from .codec import cannot_unpickle
from .ends import RingReader, RingWriter
from .native_ring import CANCELLED, EMPTY, IN_PLACE, INLINE, MESSAGE, READY, api

#: What put() and try_put() say: not applicable (it is to be pickled), sent, no slot is free, busy
#: (another thread is inside).
NOT_APPLICABLE, SENT, FULL, BUSY = range(4)


def module() -> ModuleType | None:
    """The native module; None where it cannot be had. NativeLibraryError if it is broken."""
    return native.python_module("_native_queue")


def writer_end(writer: RingWriter, is_only: bool) -> Any:
    """The end of `writer`. `is_only`: there are no readers on other hosts, who get pickles."""
    slot_bytes = writer.ring.slot_bytes if is_only else 0
    found = module()
    if found is None:
        return PythonWriterEnd(writer, slot_bytes)
    return found.WriterEnd(writer.handle, slot_bytes)


def reader_end(reader: RingReader, timeout_s: float) -> Any:
    """The end of `reader`. `timeout_s`: where dequeue() is given none."""
    found = module()
    if found is None:
        return PythonReaderEnd(reader)
    functions = pickle.loads, cannot_unpickle
    watched = reader.writer_fd, timeout_s
    return found.ReaderEnd(reader.handle, *functions, NOTHING, *watched)


class _Nothing:
    """What get() returns where there is nothing to be had at once."""


class PythonWriterEnd:
    """native/python/writer_end.cpp, without plain data."""

    def __init__(self, writer: RingWriter, slot_bytes: int) -> None:
        lock = threading.Lock()
        self.acquire, self.release = lock.acquire, lock.release
        self._handle = ctypes.c_void_p(writer.handle)
        self._slot_bytes = slot_bytes
        # A plain look at a word that readers change: a hint, which costs less than a call.
        begin = api().sleepers_offset()
        self._sleepers = writer.ring.view[begin : begin + 8].cast("Q")

    def try_put(self, obj: Any) -> int:
        return BUSY  # a call into the library is safe with the lock alone

    def put(self, obj: Any) -> int:
        if self._handle and self._sleepers[0]:
            api().nudge(self._handle)
        return NOT_APPLICABLE

    def put_pickle(self, stream: bytes) -> bool:
        if not self._handle or len(stream) > self._slot_bytes:
            return False
        return bool(api().try_write(self._handle, stream, len(stream)))

    def detach(self) -> None:
        self._handle = ctypes.c_void_p()
        self._sleepers = memoryview(bytes(8)).cast("Q")


class PythonReaderEnd:
    """native/python/reader_end.cpp."""

    def __init__(self, reader: RingReader) -> None:
        lock = threading.Lock()
        self.acquire, self.release = lock.acquire, lock.release
        self._handle = ctypes.c_void_p(reader.handle)
        self._taken = reader.taken
        self._ring = reader.ring
        self._writer = reader.writer_fd
        self._batch = memoryview(reader.taken.bytes).cast("B")
        self._copied: deque[memoryview] = deque()  # messages that the ring needs no more

    def get(self, timeout: Any) -> Any:
        return NOTHING

    def waited(self) -> float:
        return 0.0

    def look(self, timeout_ns: int, again: bool) -> int:
        while handle := self._handle:
            found = self._find(handle)
            if found != EMPTY:
                return found
            result: int = api().reader_wait(handle, timeout_ns, again, self._writer)
            if result != READY:
                return result
        return CANCELLED

    def _find(self, handle: ctypes.c_void_p) -> int:
        if self._copied:
            return MESSAGE
        copied = api().take(handle)
        if copied == 0:
            return EMPTY
        begin = 0
        for end in self._taken.ends[: max(0, copied)]:
            self._copied.append(self._batch[begin:end])
            begin = end
        return MESSAGE if copied > 0 or self._taken.kind == INLINE else IN_PLACE

    def receive(self, timeout_ns: int, again: bool) -> Any:
        handle = self._handle
        found = self.look(timeout_ns, again)
        if found != MESSAGE:
            return found
        if self._copied:
            message, used_up = self._copied[0], self._copied.popleft
        else:
            begin = self._taken.offset
            message = self._ring.view[begin : begin + self._taken.size]
            used_up = functools.partial(api().done, handle)
        try:
            decoded = (pickle.loads if message[0] == plain.PICKLE_BEGIN else plain.decode)(message)
        except KeyboardInterrupt:
            raise  # the message stays the next one
        except BaseException as error:
            used_up()
            if isinstance(error, Exception):
                raise cannot_unpickle(error) from error
            raise
        used_up()
        return (decoded,)

    def detach(self) -> None:
        self._handle = ctypes.c_void_p()


NOTHING: Any = _Nothing()
