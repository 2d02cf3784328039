"""Chunks of bytes that the caller writes and reads in place: acquire_write() and acquire_read().

A chunk that a slot can hold lies there, a larger one in a block of the arena.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import InvalidArgumentError
from .deadline import LOOK_S, Deadline
from .ends import RingReader, RingWriter
from .native_ring import BLOCK_HEADER_BYTES, IN_PLACE, MESSAGE, RAW, RAW_BLOCK, api

if TYPE_CHECKING:
    from .remote_reader import RemoteReader

NOT_RAW = "acquire_read(): the next message was written by enqueue(); dequeue() reads it"


@contextlib.contextmanager
def new_chunk(writer: RingWriter, size: int, deadline: Deadline) -> Iterator[memoryview]:
    """`size` bytes to write to, published when the context ends without an error.

    A slot must be free.
    """
    view = writer.ring.view
    if size <= writer.ring.slot_bytes:
        begin = api().slot_payload(writer.handle) - writer.ring.base
        with view[begin : begin + size] as chunk:
            yield chunk
        api().publish(writer.handle, RAW, size, 0)
        return
    block = writer.allocate(BLOCK_HEADER_BYTES + size, deadline, in_slot_count=True)
    begin = block + BLOCK_HEADER_BYTES
    try:
        with view[begin : begin + size] as chunk:
            yield chunk
    except BaseException:
        api().free_block(writer.handle, block)
        raise
    api().publish(writer.handle, RAW_BLOCK, size, block)


@contextlib.contextmanager
def next_chunk(reader: RingReader, end: Any, deadline: Deadline) -> Iterator[memoryview]:
    """The next chunk of the ring; waits for it. `end`: of native_end.py."""
    again = False
    while True:
        found = end.look(deadline.slice_ns(LOOK_S), again)
        if found in (MESSAGE, IN_PLACE):
            break
        reader.check(found, deadline)
        again = True
    kind, size, offset = reader.taken.kind, reader.taken.size, reader.taken.offset
    if found == MESSAGE or kind not in (RAW, RAW_BLOCK):
        raise InvalidArgumentError(NOT_RAW)
    begin = offset + BLOCK_HEADER_BYTES if kind == RAW_BLOCK else offset
    try:
        with reader.ring.view[begin : begin + size] as chunk:
            yield chunk
    finally:
        api().done(reader.handle)
        if kind == RAW_BLOCK:
            api().release_block(reader.ring.base, reader.index, offset)


@contextlib.contextmanager
def next_remote_chunk(reader: RemoteReader, deadline: Deadline) -> Iterator[memoryview]:
    """The next chunk that came over TCP; waits for it."""
    if reader.next_kind(deadline) != RAW:
        raise InvalidArgumentError(NOT_RAW)
    stream, *_ = reader.next_message()
    try:
        with memoryview(stream) as chunk:
            yield chunk
    finally:
        reader.used_up()
