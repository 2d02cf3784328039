"""ctypes over the C interface of the ring (native/shm/ring_api.cpp), line by line."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

from ..bindings import native

# The enumerations of native/shm/ring.h.
INLINE, RAW, BLOCK, RAW_BLOCK = 1, 2, 3, 4  # SlotKind
ABSENT, JOINED, LEFT, DEAD = range(4)  # ReaderState
READY, TIMED_OUT, CLOSED, INTERRUPTED, CANCELLED, PEER_GONE = range(6)  # WaitResult
MESSAGE, IN_PLACE, EMPTY = READY, 6, 7  # Look, of native/python/reader_end.cpp
MUST_WAIT, NO_ROOM, NO_MEMORY = -1, -2, -3  # allocate_block
BLOCK_HEADER_BYTES = 64
PUBLISHED, JOINED_COUNT, READY_FLAG = range(3)  # of communicators_ring_word


class Taken(ctypes.Structure):
    """RingReader::Taken of native/shm/ring.h."""

    _fields_ = (
        ("copied", ctypes.c_uint32),
        ("kind", ctypes.c_uint32),
        ("offset", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("ends", ctypes.c_uint32 * 64),
        ("padding", ctypes.c_ubyte * 40),
        ("bytes", ctypes.c_ubyte * (32 << 10)),
    )


_P, _I, _U32, _U64, _I64 = (
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint32,
    ctypes.c_uint64,
    ctypes.c_int64,
)
# name -> (result, arguments). Those that wait or copy much release the interpreter's lock.
_QUICK: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "bytes": (_U64, (_U32, _U32, _U64, _U64)),
    "create": (None, (_P, _U32, _U32, _U64, _U64, ctypes.c_char_p, _U32)),
    "check": (_I, (_P, ctypes.c_char_p)),
    "reader_info": (None, (_P, _U32, _P)),
    "word": (_U32, (_P, _I)),
    "set_ready": (None, (_P,)),
    "writer_open": (_P, (_P, _I, _U64, _I64, _I64)),
    "writer_free": (None, (_P,)),
    "has_slot": (_I, (_P,)),
    "slot_bytes": (_U64, (_U64,)),
    "slot_data": (None, (_P, _U64, _P)),
    "slot_payload": (_P, (_P,)),
    "publish": (None, (_P, _U32, _U64, _U64)),
    "free_block": (None, (_P, _U64)),
    "drop": (None, (_P, _U32)),
    "close": (None, (_P,)),
    "sent": (_U64, (_P,)),
    "backed_bytes": (_U64, (_P,)),
    "reader_open": (_P, (_P, _U32, _I64, _I64)),
    "reader_free": (None, (_P,)),
    "join": (_I, (_P, _U32, _U64)),
    "leave": (None, (_P,)),
    "taken": (_P, (_P,)),
    "done": (None, (_P,)),
    "release_block": (None, (_P, _U32, _U64)),
    "received": (_U64, (_P,)),
    "nudge": (None, (_P,)),
    "sleepers_offset": (_U64, ()),
    "cancel_writer": (None, (_P,)),
    "cancel_reader": (None, (_P,)),
}
_SLOW: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "wait_word": (None, (_P, _I, _U32, _I64)),
    "copy": (None, (_P, _P, _U64)),
    "allocate_block": (_I64, (_P, _U64, _I)),
    "writer_wait": (_I, (_P, _I64, _I)),
    "reader_wait": (_I, (_P, _I64, _I, _I)),
}


class _Api:
    """The C functions of native/shm/ring_api.cpp, as attributes."""

    def __init__(self) -> None:
        path = str(native.load("cpu"))
        for library, table in ((ctypes.PyDLL(path), _QUICK), (ctypes.CDLL(path), _SLOW)):
            for name, (result, arguments) in table.items():
                function = getattr(library, f"communicators_ring_{name}")
                function.restype, function.argtypes = result, arguments
                setattr(self, name, function)
        # The two of the short path, without a prototype, which makes a call 0.1 us shorter: they
        # take a c_void_p, bytes and a C int, and return a C int.
        quick = ctypes.PyDLL(path)
        self.try_write = quick.communicators_ring_try_write
        self.take = quick.communicators_ring_take

    def __getattr__(self, name: str) -> Callable[..., Any]:  # for type checkers; all are set above
        raise AttributeError(name)


@functools.cache
def api() -> _Api:
    """The functions, loaded once. NativeLibraryError if there is no native library."""
    return _Api()
