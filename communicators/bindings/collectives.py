"""ctypes over the C interface of the CUDA library's collectives (native/collectives/c_api.cu).

A call through ctypes costs less than one through torch's operator dispatch, and an all-reduce
through the module `_native_all_reduce` less again (docs/custom_all_reduce.md has the figures).
Under torch.compile the operators `torch.ops.communicators.custom_ar_*` and `quick_all_reduce` are
used instead; their fakes are registered here.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch

from ..groups.traced import keep
from . import native

_POINTER, _SIZE, _NUMBER, _HANDLE = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int, ctypes.c_int64
_HANDLE_OUT, _SIZES = ctypes.POINTER(_HANDLE), ctypes.POINTER(_SIZE)
_DATA = (_POINTER, _POINTER, _SIZE, _POINTER)  # input, output, bytes, stream

# name -> (result, arguments). A result of _NUMBER is a status: 0, or 1 and gpu_error() says why.
_FUNCTIONS: Mapping[str, tuple[Any, tuple[Any, ...]]] = {
    "gpu_error": (ctypes.c_char_p, ()),
    "gpu_check": (_NUMBER, (_HANDLE,)),
    "gpu_destroy": (_NUMBER, (_HANDLE,)),
    "gpu_retire": (_NUMBER, (_HANDLE,)),
    "gpu_captured": (_NUMBER, (_HANDLE, _SIZES, _SIZES)),
    "gpu_graphs": (_NUMBER, (_HANDLE, ctypes.POINTER(_NUMBER))),
    "gpu_set_timeout_ns": (_NUMBER, (_HANDLE, _SIZE)),
    "custom_ar_bytes": (_SIZE, (_SIZE, _SIZE, _SIZE)),
    "custom_ar_create": (_NUMBER, (_HANDLE_OUT, _SIZES, _NUMBER, _NUMBER, _SIZE, _SIZE, _SIZE)),
    "custom_ar_all_reduce": (_NUMBER, (_HANDLE, _NUMBER, *_DATA)),
    "custom_ar_all_gather": (_NUMBER, (_HANDLE, *_DATA)),
    "custom_ar_reduce_scatter": (_NUMBER, (_HANDLE, _NUMBER, *_DATA)),
    "custom_ar_tune": (_NUMBER, (_HANDLE, ctypes.c_char_p, ctypes.c_int64)),
    "custom_ar_algorithm": (_NUMBER, (_HANDLE, _SIZE, ctypes.POINTER(_NUMBER))),
    "quick_ar_bytes": (_SIZE, (_SIZE,)),
    "quick_ar_create": (_NUMBER, (_HANDLE_OUT, _SIZES, _NUMBER, _NUMBER, _SIZE)),
    "quick_ar_all_reduce": (_NUMBER, (_HANDLE, _NUMBER, _NUMBER, *_DATA)),
    "quick_ar_set_launch": (_NUMBER, (_HANDLE, _NUMBER, _NUMBER, _NUMBER, _NUMBER)),
}

#: What is summed, by DType of native/prim/dtype.h.
DTYPES = {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}
#: collectives::Algorithm
ALGORITHMS = ("automatic", "one_shot", "streamed", "two_shot")
#: quick::Codec
CODECS = ("FP", "Q8", "Q6", "Q4")

#: Takes the ordinal of a GPU, returns the address of its current stream; a CPU build has none.
current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)

#: (inp, out) -> a status, or NOT_APPLICABLE: nothing was done, for they are not two contiguous
#: tensors on the GPU, of one size and one of DTYPES.
AllReduceCall = Callable[[torch.Tensor, torch.Tensor], int]
NOT_APPLICABLE = -1


class Collectives:
    """The functions, and what ended handles keep for the graphs that recorded their calls.

    A handle is a positive number that is never given out twice; whatever else comes back raises
    InvalidArgumentError. Sizes are bytes, data are addresses; launches go to the device that was
    current when the handle was made.
    """

    # What _FUNCTIONS names; a test compares.
    gpu_error: Callable[..., Any]
    gpu_check: Callable[..., Any]
    gpu_destroy: Callable[..., Any]
    gpu_retire: Callable[..., Any]
    gpu_captured: Callable[..., Any]
    gpu_graphs: Callable[..., Any]
    gpu_set_timeout_ns: Callable[..., Any]
    custom_ar_bytes: Callable[..., Any]
    custom_ar_create: Callable[..., Any]
    custom_ar_all_reduce: Callable[..., Any]
    custom_ar_all_gather: Callable[..., Any]
    custom_ar_reduce_scatter: Callable[..., Any]
    custom_ar_tune: Callable[..., Any]
    custom_ar_algorithm: Callable[..., Any]
    quick_ar_bytes: Callable[..., Any]
    quick_ar_create: Callable[..., Any]
    quick_ar_all_reduce: Callable[..., Any]
    quick_ar_set_launch: Callable[..., Any]

    def __init__(self, path: str) -> None:
        #: By handle, the memory of all ranks; and what is to be done once no graph reads it.
        self._pointers: dict[int, list[int]] = {}
        self._retired: dict[int, list[Callable[[], None]]] = {}
        self.library = ctypes.CDLL(path)
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(self.library, f"communicators_{name}")
            function.restype, function.argtypes = result, arguments
            # Of those that move data the callers look at the status: a call less on their way.
            moves = name.endswith(("all_reduce", "all_gather", "reduce_scatter"))
            if result is _NUMBER and not moves:
                function = functools.partial(self._checked, function)
            setattr(self, name, function)
        function = self.library.communicators_custom_ar_all_reduce
        self.all_reduce_address = ctypes.cast(function, _POINTER).value

    def create_custom_ar(
        self, pointers: Sequence[int], rank: int, layout: tuple[int, int, int]
    ) -> int:
        """A handle of the exact collectives over workspaces at `pointers`, one per rank.

        Args:
            layout: bytes of (slot, region for LL packets, bulk region).
        """
        return self._create(self.custom_ar_create, pointers, rank, layout)

    def create_quick_ar(self, pointers: Sequence[int], rank: int, area: int) -> int:
        """A handle of the quantized all-reduce over buffers at `pointers` with areas of `area`
        bytes."""
        return self._create(self.quick_ar_create, pointers, rank, (area,))

    def _create(
        self, create: Any, pointers: Sequence[int], rank: int, layout: tuple[int, ...]
    ) -> int:
        self.reclaim()
        handle = _HANDLE()
        bases = (_SIZE * len(pointers))(*pointers)
        create(ctypes.byref(handle), bases, len(pointers), rank, *layout)
        self._pointers[handle.value] = list(pointers)
        return handle.value

    def captured(self, handle: int) -> tuple[int, int]:
        """How many calls graphs have recorded since it was last asked, and a digest of them."""
        calls, digest = _SIZE(), _SIZE()
        self.gpu_captured(handle, ctypes.byref(calls), ctypes.byref(digest))
        return calls.value, digest.value

    def graphs(self, handle: int) -> int:
        """How many graphs exist that recorded calls of the handle."""
        found = _NUMBER()
        self.gpu_graphs(handle, ctypes.byref(found))
        return found.value

    def algorithm(self, handle: int, nbytes: int) -> str:
        """Which algorithm an exact all-reduce of so many bytes uses."""
        found = _NUMBER()
        self.custom_ar_algorithm(handle, nbytes, ctypes.byref(found))
        return ALGORITHMS[found.value]

    def tune(self, handle: int, name: str, value: int) -> None:
        """Overrides one choice of the algorithms; must be the same on all ranks."""
        self.custom_ar_tune(handle, name.encode(), value)

    def all_reduce_call(self, handle: int, example: torch.Tensor) -> AllReduceCall:
        """The exact all-reduce of `handle`, for two tensors as they come, on `example`'s GPU."""
        module = native.python_module("_native_all_reduce")
        if module is None:
            index = example.get_device()
            return functools.partial(self._all_reduce_in_python, handle, index)
        call: AllReduceCall = module.AllReduceCall(self.all_reduce_address, handle, example).run
        return call

    def _all_reduce_in_python(
        self, handle: int, index: int, inp: torch.Tensor, out: torch.Tensor
    ) -> int:
        """native/python/all_reduce_call.cpp, where that is not to be had."""
        fits = (
            inp.get_device() == out.get_device() == index
            and inp.dtype is out.dtype
            and inp.nbytes == out.nbytes
            and inp.is_contiguous()
            and out.is_contiguous()
        )
        code = DTYPES.get(inp.dtype)
        if code is None or not fits:
            return NOT_APPLICABLE
        status: int = self.custom_ar_all_reduce(
            handle, code, inp.data_ptr(), out.data_ptr(), inp.nbytes, current_stream(index)
        )
        return status

    # -- the end of a handle ----------------------------------------------------------------------

    def end(
        self, handle: int, device: torch.device, close: Callable[[], None] | None = None
    ) -> None:
        """Ends `handle` and then calls `close`, once no graph that recorded calls exists any more.

        A graph may be replayed until it is gone: its kernels find the memory, marked as retired,
        and end at once; unmapped, it would fault the CUDA context. Local. What earlier calls of
        this had to keep is given back as well, where its graphs are gone.
        """
        graphs = self.graphs(handle)  # raises for what is no handle, before it is noted
        torch.cuda.synchronize(device)  # bounded: every wait on the device has a deadline
        self._retired[handle] = [] if close is None else [close]
        if graphs:
            self.gpu_retire(handle)
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
            self.gpu_destroy(handle)
            for free in waiting:
                free()

    # -- errors -----------------------------------------------------------------------------------

    def check(self, status: int) -> None:
        """Raises what a status other than 0 stands for."""
        if status != 0:
            self.fail()

    def fail(self) -> NoReturn:
        """Raises the class of errors.py that the native sentence begins with."""
        raise native.typed(RuntimeError(self.gpu_error().decode()))

    def _checked(self, function: Callable[..., int], *arguments: Any) -> None:
        self.check(function(*arguments))


@functools.cache
def load() -> Collectives:
    """The library; NativeLibraryError when it is missing or cannot be loaded."""
    library = Collectives(str(native.load("cuda")))
    for name in ("all_reduce", "all_gather", "reduce_scatter"):
        torch.library.register_fake(f"communicators::custom_ar_{name}", _nothing)
        keep(getattr(torch.ops.communicators, f"custom_ar_{name}").default)
    register_quick_fake()
    return library


def _nothing(fa: int, inp: torch.Tensor, out: torch.Tensor, *_: object, **__: object) -> None:
    torch._check(inp.dtype == out.dtype, lambda: "inp and out must have the same dtype")


@functools.cache
def register_quick_fake() -> None:
    """What `quick_all_reduce` is to a tracer; the CPU library, which has its schema, must be
    loaded."""

    @torch.library.register_fake("communicators::quick_all_reduce")
    def _(fa: int, inp: torch.Tensor, out: torch.Tensor, codec: int, order: object = None) -> None:
        torch._check(inp.dtype == out.dtype, lambda: "inp and out must have the same dtype")
        torch._check(inp.numel() == out.numel(), lambda: "inp and out must have the same size")

    keep(torch.ops.communicators.quick_all_reduce.default)
