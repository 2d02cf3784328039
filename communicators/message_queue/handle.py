"""What a reader of a MessageQueue joins with."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import RefusedError
from ..settings import Settings
from .ends import RingReader
from .process import Process, pid_space, proc_problem
from .ring import ShmRingBuffer

VERSION = 2  # of Handle and of what it leads to


@dataclass(frozen=True)
class Handle:
    """What a reader needs to join a queue. Give it to readers only: it holds the remote keys."""

    version: int
    n_reader: int
    local_reader_ranks: tuple[int, ...]
    max_chunk_bytes: int
    max_chunks: int
    remote_window: int  # messages that a remote reader may have unread
    writer_pid: int
    writer_started: int
    pid_space: str
    ring: str | None  # ShmRingBuffer.name
    remote_address: str | None
    remote_key: bytes = field(repr=False, default=b"")


def join_ring(handle: Handle, rank: int, settings: Settings) -> RingReader:
    """Maps the ring of the writer of this host, and takes the place of `rank` in it."""
    why = proc_problem()
    if why is None and handle.pid_space != pid_space():
        why = "the writer runs on another host or in another pid namespace, or without its /proc"
    if why is not None:
        raise RefusedError(
            f"create_from_handle(handle, rank={rank}): rank {rank} is listed as local to the "
            f"writer, and cannot open its memory: {why}; list it as remote"
        )
    assert handle.ring is not None
    writer = Process(handle.writer_pid, handle.writer_started)
    try:
        n_local = len(handle.local_reader_ranks)
        buffer = ShmRingBuffer(n_local, handle.max_chunk_bytes, handle.max_chunks, handle.ring)
        return RingReader(buffer, handle.local_reader_ranks.index(rank), rank, writer, settings)
    except BaseException:
        writer.close()
        raise
