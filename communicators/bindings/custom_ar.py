"""ctypes over the C interface of the CUDA library's collectives (native/collectives/c_api.cu).

A call through ctypes costs about a microsecond less than one through torch's operator dispatch.
Under torch.compile the operators `torch.ops.communicators.custom_ar_*` are used instead; their
fakes are registered here.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import NoReturn

import torch

from .. import native
from ..errors import CommTimeoutError, CommunicatorError, InvalidArgumentError

#: collectives::Dtype
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

#: collectives::Algorithm
ALGORITHMS = ("automatic", "one_shot", "streamed", "two_shot", "copy_engine")

_FAILURES: dict[int, type[CommunicatorError]] = {
    1: CommTimeoutError,
    2: CommunicatorError,
    3: InvalidArgumentError,
    4: CommunicatorError,
}


class CustomArLibrary:
    """The C functions, typed. Those that return a status are checked with `check`."""

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path)
        pointer, size, number = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int

        def function(name: str, result: object, *arguments: object) -> ctypes._NamedFuncPointer:
            found = getattr(library, f"communicators_ar_{name}")
            found.restype = result
            found.argtypes = arguments
            return found

        self.error = function("error", ctypes.c_char_p)
        self.bytes = function("bytes", size, size, size, size)
        self.create_ = function(
            "create", number, ctypes.POINTER(pointer), ctypes.POINTER(size), number, number, size,
            size, size,
        )  # fmt: skip
        self.destroy = function("destroy", None, pointer)
        self.all_reduce = function(
            "all_reduce", number, pointer, number, pointer, pointer, size, pointer
        )
        self.all_gather = function("all_gather", number, pointer, pointer, pointer, size, pointer)
        self.reduce_scatter = function(
            "reduce_scatter", number, pointer, number, pointer, pointer, size, pointer
        )
        self.check_ = function("check", number, pointer)
        self.set_timeout_ns = function("set_timeout_ns", None, pointer, size)
        self.retire = function("retire", number, pointer)
        self.tune_ = function("tune", number, pointer, ctypes.c_char_p, ctypes.c_int64)
        self.algorithm = function("algorithm", number, pointer, size)

    def create(self, pointers: Sequence[int], rank: int, layout: tuple[int, int, int]) -> int:
        """A handle over the workspaces at `pointers` (one a rank) with (slot, tagged, bulk) bytes.

        The current device is the one that launches go to.
        """
        handle = ctypes.c_void_p()
        bases = (ctypes.c_uint64 * len(pointers))(*pointers)
        self.check(self.create_(ctypes.byref(handle), bases, len(pointers), rank, *layout))
        assert handle.value is not None
        return handle.value

    def tune(self, handle: int, name: str, value: int) -> None:
        """Overrides one choice of the algorithms; must be the same on all ranks."""
        self.check(self.tune_(handle, name.encode(), value))

    def check(self, status: int) -> None:
        """Raises what a status other than 0 stands for."""
        if status != 0:
            self.fail(status)

    def fail(self, status: int) -> NoReturn:
        """CommTimeoutError, InvalidArgumentError or CommunicatorError with the native sentence."""
        raise _FAILURES[status](self.error().decode())


@functools.cache
def load() -> CustomArLibrary:
    """The library; NativeLibraryError when it is missing or cannot be loaded."""
    library = CustomArLibrary(str(native.load("cuda")))
    _register_fakes()
    return library


def _register_fakes() -> None:
    def nothing(fa: int, inp: torch.Tensor, out: torch.Tensor, world: int = 1) -> None:
        torch._check(inp.dtype == out.dtype, lambda: "inp and out must have the same dtype")

    for name in ("all_reduce", "all_gather", "reduce_scatter"):
        torch.library.register_fake(f"communicators::custom_ar_{name}", nothing)
