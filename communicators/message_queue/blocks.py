"""A large message in a block of the ring's arena: how it is laid out, written and read.

    bytes 0..63    who still holds the block (native/shm/ring.h)
    then           the number of pieces, and offset and size of each, as u64 of this machine
    then           the pieces, each at a multiple of 64: the pickle stream, then its buffers

One block holds all buffers of a message, so there is one allocation and one release a message.
"""

from __future__ import annotations

import os
import struct
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from .codec import address_of, decode
from .deadline import Deadline
from .ends import RingReader, RingWriter
from .native_ring import BLOCK, BLOCK_HEADER_BYTES, api

_ALIGN = 64
_COUNT = struct.Struct("=Q")
#: Copies from here on release the interpreter's lock.
_UNLOCKED_BYTES = 1 << 16


def _aligned(offset: int) -> int:
    return (offset + _ALIGN - 1) // _ALIGN * _ALIGN


def write_block(
    writer: RingWriter,
    parts: Sequence[Any],
    buffers: Sequence[memoryview],
    deadline: Deadline,
    in_slot_count: bool,
) -> None:
    """Stores the stream, in `parts`, and its buffers, and publishes them. A slot must be free.

    `in_slot_count`: see RingWriter.allocate.
    """
    stream = sum(memoryview(part).nbytes for part in parts)
    table = []
    end = BLOCK_HEADER_BYTES + _COUNT.size * (1 + 2 * (1 + len(buffers)))
    for size in (stream, *(buffer.nbytes for buffer in buffers)):
        begin = _aligned(end)
        end = begin + size
        table += [begin, size]
    block = writer.allocate(end, deadline, in_slot_count)
    try:
        view = writer.ring.view
        words = struct.pack(f"={1 + len(table)}Q", 1 + len(buffers), *table)
        view[block + BLOCK_HEADER_BYTES : block + BLOCK_HEADER_BYTES + len(words)] = words
        at = block + table[0]
        for part in parts:
            at += _put(writer, at, part)
        for begin, buffer in zip(table[2::2], buffers, strict=True):
            _put(writer, block + begin, buffer)
    except BaseException:
        api().free_block(writer.handle, block)
        raise
    api().publish(writer.handle, BLOCK, end, block)


def _put(writer: RingWriter, at: int, piece: Any) -> int:
    size = memoryview(piece).nbytes
    if size < _UNLOCKED_BYTES:
        writer.ring.view[at : at + size] = piece
    else:
        api().copy(writer.ring.base + at, address_of(piece), size)
    return size


def read_block(reader: RingReader, copy: bool) -> Any:
    """The object in the block that take() found."""
    block, size = reader.taken.offset, reader.taken.size
    # Whatever is made from the lease keeps it, and it keeps the mapping.
    lease = reader.ring.lease()
    whole = memoryview(lease).cast("B").toreadonly()[block : block + size]
    (count,) = _COUNT.unpack_from(whole, BLOCK_HEADER_BYTES)
    words = struct.unpack_from(f"={2 * count}Q", whole, BLOCK_HEADER_BYTES + _COUNT.size)
    spans = list(zip(words[::2], words[1::2], strict=True))
    begin, length = spans.pop(0)
    stream = whole[begin : begin + length]
    try:
        if copy or not spans:
            obj = decode(stream, [_private(reader.ring.base + block + b, n) for b, n in spans])
        else:
            obj = decode(stream, [whole[b : b + n] for b, n in spans])
    except KeyboardInterrupt:
        raise  # the message stays the next one
    except BaseException:
        api().done(reader.handle)
        api().release_block(reader.ring.base, reader.index, block)
        raise
    # Ctrl-C until here has left the message where it is. From here on it may lose it, and must not
    # let go of a block that is to be read again: done() comes first.
    api().done(reader.handle)
    if copy or not spans:
        api().release_block(reader.ring.base, reader.index, block)
    else:
        release_with(lease, reader, block)
    return obj


def release_with(lease: Any, reader: RingReader, block: int) -> None:
    """Releases `block` when the last array or tensor over `lease` is gone.

    What releases it holds the mapping itself: in which order the lease, the arrays over it and the
    queue are taken apart, and whether the release comes before or after that, is then no matter.
    """
    held = reader.ring.hold(), reader.ring.base, reader.index, block, os.getpid()
    weakref.finalize(lease, _release, *held).atexit = False


def _release(mapping: memoryview, base: int, index: int, block: int, pid: int) -> None:
    if os.getpid() == pid:  # in a forked child the parent still holds it
        api().release_block(base, index, block)
    mapping.release()


def _private(address: int, size: int) -> np.ndarray:
    memory = np.empty(size, np.uint8)  # unlike bytearray, not filled with zeros first
    api().copy(memory.__array_interface__["data"][0], address, size)
    return memory
