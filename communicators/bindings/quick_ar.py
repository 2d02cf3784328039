"""ctypes over the C interface of the quantized all-reduce (native/collectives/quick_c_api.cu)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import NoReturn

from .. import native
from ..errors import CommTimeoutError, CommunicatorError, InvalidArgumentError

#: quick::Codec
CODECS = ("FP", "Q8", "Q6", "Q4")

_FAILURES: dict[int, type[CommunicatorError]] = {
    1: CommTimeoutError,
    2: CommunicatorError,
    3: InvalidArgumentError,
    4: CommunicatorError,
}


class QuickArLibrary:
    """The C functions, typed. Those that return a status are checked with `check`."""

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path)
        pointer, size, number = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int

        def function(name: str, result: object, *arguments: object) -> ctypes._NamedFuncPointer:
            found = getattr(library, f"communicators_qr_{name}")
            found.restype = result
            found.argtypes = arguments
            return found

        self.error = function("error", ctypes.c_char_p)
        self.bytes = function("bytes", size, size)
        self.create_ = function(
            "create", number, ctypes.POINTER(pointer), ctypes.POINTER(size), number, number, size
        )
        self.destroy = function("destroy", None, pointer)
        self.retire = function("retire", number, pointer)
        self.all_reduce = function(
            "all_reduce", number, pointer, number, number, pointer, pointer, size, pointer
        )
        self.check_ = function("check", number, pointer)
        self.set_timeout_ns = function("set_timeout_ns", None, pointer, size)
        self.set_launch = function("set_launch", number, pointer, number, number, number, number)

    def create(self, pointers: Sequence[int], rank: int, area: int) -> int:
        """A handle over the buffers at `pointers`, one a rank, with areas of `area` bytes.

        The current device is the one that launches go to.
        """
        handle = ctypes.c_void_p()
        bases = (ctypes.c_uint64 * len(pointers))(*pointers)
        self.check(self.create_(ctypes.byref(handle), bases, len(pointers), rank, area))
        assert handle.value is not None
        return handle.value

    def check(self, status: int) -> None:
        """Raises what a status other than 0 stands for."""
        if status != 0:
            self.fail(status)

    def fail(self, status: int) -> NoReturn:
        """CommTimeoutError, InvalidArgumentError or CommunicatorError with the native sentence."""
        raise _FAILURES[status](self.error().decode())


@functools.cache
def load() -> QuickArLibrary:
    """The library; NativeLibraryError when it is missing or cannot be loaded."""
    return QuickArLibrary(str(native.load("cuda")))
