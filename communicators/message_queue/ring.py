"""The memory of a queue's ring. The protocol is in native/shm/ring.h, with its state table.

It is a memfd: it has no name, so nothing can be left behind, and it does not count against
the size of /dev/shm, which containers often set to 64 MB. A process that comes later opens
/proc/<pid of the writer>/fd/<n>: that needs no server and no thread in the writer, works with spawn
and fork alike, is refused by the kernel to other users, and ends with the writer. The file is as
large as the machine's memory (256 GiB at most) and sparse, so that large messages find room without
a second file; what was never written to takes none.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import secrets
from collections.abc import Iterator
from typing import Any

from ..errors import InvalidArgumentError, PeerDiedError, RefusedError
from .native_ring import PUBLISHED, api

MAX_READERS = 64
_F_ADD_SEALS, _SEAL_SHRINK, _SEAL_GROW = 1033, 2, 4  # <linux/fcntl.h>


class ShmRingBuffer:
    """The memory of a ring: `max_chunks` slots, and an arena behind them.

    A slot holds messages of up to `slot_bytes`: max_chunk_bytes, 64 KiB at most, for a slot keeps
    the memory of the largest message that it ever held. What is larger lies in the arena.

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
        self.slot_bytes: int = api().slot_bytes(max_chunk_bytes)
        self.is_creator = name is None
        self.name = self._create() if name is None else self._open(name)
        self.view = memoryview(self._map)

    def _create(self) -> str:
        # Address space only; bounded so that hundreds of queues fit into a process.
        arena = min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), 1 << 38)
        size = api().bytes(self.n_reader, self.max_chunks, self.slot_bytes, arena)
        self.fd = os.memfd_create("message-queue", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size)
        fcntl.fcntl(self.fd, _F_ADD_SEALS, _SEAL_SHRINK | _SEAL_GROW)
        self._map_file(size)
        unique = secrets.token_bytes(16)
        sizes = (self.n_reader, self.max_chunks, self.slot_bytes, arena)
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
        self._region_type = ctypes.c_ubyte * size
        self.base: int = ctypes.addressof(self.lease())

    def __reduce__(self) -> tuple[Any, ...]:
        sizes = (self.n_reader, self.max_chunk_bytes, self.max_chunks)
        return ShmRingBuffer, (*sizes, self.name)

    @contextlib.contextmanager
    def get_data(self, current_idx: int) -> Iterator[memoryview]:
        """The bytes of slot `current_idx`, for as long as the context lasts.

        If acquire_write() put a larger chunk there, those of the chunk.
        """
        data = (ctypes.c_uint64 * 2)()
        api().slot_data(self.base, current_idx % self.max_chunks, data)
        begin, size = data
        with self.view[begin : begin + size] as chunk:
            yield chunk

    @contextlib.contextmanager
    def get_metadata(self, current_idx: int) -> Iterator[memoryview]:
        """The flags of the message last written to slot `current_idx`: written, then a reader each.

        A snapshot derived from the ring's counters (the table in native/shm/ring.h): 1 and zeros is
        WRITTEN, ones is READ, all zeros is FREE.
        """
        published = api().word(self.base, PUBLISHED) >> 1
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

    def lease(self) -> Any:
        """A new object over the whole region, writable; it keeps the mapping.

        One of ctypes, not of numpy: a class written in Python can export its memory from Python
        3.12 on only, and what an array does when it is freed is numpy's to change.
        """
        return self._region_type.from_buffer(self._map)

    def hold(self) -> memoryview:
        """Keeps the mapping for as long as it lives, whatever else is freed or closed."""
        return memoryview(self._map)

    def close(self) -> None:
        """Unmaps it, now or when the last view of it is gone. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        # Views that somebody holds keep the mapping; it goes with the last one.
        with contextlib.suppress(BufferError, AttributeError):
            self.view.release()
            self._map.close()
