"""ctypes over one of the CUDA library's C interfaces: what they have in common.

Each has a prefix, handles, statuses that stand for exceptions, and a sentence for the last one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NoReturn

import torch

from ..errors import CommTimeoutError, CommunicatorError, InvalidArgumentError

POINTER, SIZE, NUMBER = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int

#: collectives::Failure and quick::Failure.
_FAILURES: dict[int, type[CommunicatorError]] = {
    1: CommTimeoutError,  # a peer did not come
    2: CommunicatorError,  # two calls in flight on one handle
    3: InvalidArgumentError,
    4: CommunicatorError,  # of the platform
}


class CollectivesLibrary:
    """The functions that every interface has. Those that return a status go through `check`.

    Attributes of a subclass:
        prefix: of its functions' names.
        layout_sizes: how many sizes in bytes describe the memory of a rank.
    """

    prefix: ClassVar[str]
    layout_sizes: ClassVar[int]

    def __init__(self, path: str) -> None:
        #: By handle, the memory of all ranks; and what is to be done once no graph reads it.
        self._pointers: dict[int, list[int]] = {}
        self._retired: dict[int, list[Callable[[], None]]] = {}
        self._library = ctypes.CDLL(path)
        sizes = [SIZE] * self.layout_sizes
        self.error = self.function("error", ctypes.c_char_p)
        self.bytes = self.function("bytes", SIZE, *sizes)
        self._create = self.function(
            "create", NUMBER, ctypes.POINTER(POINTER), ctypes.POINTER(SIZE), NUMBER, NUMBER, *sizes
        )
        self.destroy = self.function("destroy", None, POINTER)
        self.retire = self.function("retire", NUMBER, POINTER)
        self.check_ = self.function("check", NUMBER, POINTER)
        self.graphs = self.function("graphs", NUMBER, POINTER)
        sizes_out = (ctypes.POINTER(SIZE), ctypes.POINTER(SIZE))
        self._captured = self.function("captured", None, POINTER, *sizes_out)
        self.set_timeout_ns = self.function("set_timeout_ns", None, POINTER, SIZE)

    def function(self, name: str, result: Any, *arguments: Any) -> ctypes._NamedFuncPointer:
        """The C function `<prefix>_<name>` with its types."""
        found = getattr(self._library, f"{self.prefix}_{name}")
        found.restype = result
        found.argtypes = arguments
        return found

    def create(self, pointers: Sequence[int], rank: int, layout: Sequence[int]) -> int:
        """A handle over the memory at `pointers`, one per rank, of the sizes `layout` in bytes.

        The current device is the one that launches go to.
        """
        self.reclaim()
        handle = POINTER()
        bases = (SIZE * len(pointers))(*pointers)
        self.check(self._create(ctypes.byref(handle), bases, len(pointers), rank, *layout))
        assert handle.value is not None
        self._pointers[handle.value] = list(pointers)
        return handle.value

    def captured(self, handle: int) -> tuple[int, int]:
        """How many calls graphs have recorded since it was last asked, and a digest of them."""
        calls, digest = SIZE(), SIZE()
        self._captured(handle, ctypes.byref(calls), ctypes.byref(digest))
        return calls.value, digest.value

    def end(
        self, handle: int, device: torch.device, close: Callable[[], None] | None = None
    ) -> None:
        """Ends `handle` and then calls `close`, once no graph that recorded calls exists any more.

        A graph may be replayed until it is gone: its kernels find the memory, marked as retired,
        and end at once; unmapped, it would fault the CUDA context. Local. What earlier calls of
        this had to keep is given back as well, where its graphs are gone.
        """
        torch.cuda.synchronize(device)  # bounded: every wait on the device has a deadline
        self._retired[handle] = [] if close is None else [close]
        if self.graphs(handle):
            self.check(self.retire(handle))
        self.reclaim()

    def free(self, pointers: Sequence[int], free: Callable[[], None]) -> None:
        """Calls `free`; not before the graphs are gone that read `pointers` for an ended handle."""
        self.reclaim()
        for handle, waiting in self._retired.items():
            if not set(pointers).isdisjoint(self._pointers[handle]):
                waiting.append(free)
                return
        free()

    def reclaim(self) -> None:
        """Gives back what ended handles had to keep for graphs that are gone by now."""
        for handle in [handle for handle in self._retired if not self.graphs(handle)]:
            waiting = self._retired.pop(handle)
            del self._pointers[handle]
            self.destroy(handle)
            for free in waiting:
                free()

    def check(self, status: int) -> None:
        """Raises what a status other than 0 stands for."""
        if status != 0:
            self.fail(status)

    def fail(self, status: int) -> NoReturn:
        """CommTimeoutError, InvalidArgumentError or CommunicatorError with the native sentence."""
        raise _FAILURES[status](self.error().decode())
