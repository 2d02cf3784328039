"""ctypes over the C interface of the CUDA library's collectives (native/collectives/c_api.cu).

A call through ctypes costs less than one through torch's operator dispatch, and an all-reduce
through the module `_native_all_reduce` less again (docs/custom_all_reduce.md has the figures).
Under torch.compile the operators `torch.ops.communicators.custom_ar_*` are used instead; their
fakes are registered here.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch

from .. import native
from ..traced import keep
from .collectives_library import NUMBER, POINTER, SIZE, CollectivesLibrary

#: collectives::Dtype
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

#: Takes the ordinal of a GPU, returns the address of its current stream; a CPU build has none.
current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)

#: (inp, out) -> 0, a collectives::Failure, or OTHERWISE with nothing done: not two contiguous
#: tensors on the GPU, of one size and one of DTYPES.
AllReduceCall = Callable[[torch.Tensor, torch.Tensor], int]
OTHERWISE = -1

#: collectives::Algorithm
ALGORITHMS = ("automatic", "one_shot", "streamed", "two_shot")


class CustomArLibrary(CollectivesLibrary):
    """The exact collectives; the layout of `create` and `bytes` is (slot, tagged, bulk) bytes."""

    prefix = "communicators_ar"
    layout_sizes = 3

    def __init__(self, path: str) -> None:
        super().__init__(path)
        data = (POINTER, POINTER, SIZE, POINTER)  # input, output, bytes, stream
        self.all_reduce = self.function("all_reduce", NUMBER, POINTER, NUMBER, *data)
        self.all_gather = self.function("all_gather", NUMBER, POINTER, *data)
        self.reduce_scatter = self.function("reduce_scatter", NUMBER, POINTER, NUMBER, *data)
        self._all_reduce_address = ctypes.cast(self.all_reduce, POINTER).value
        self.tune_ = self.function("tune", NUMBER, POINTER, ctypes.c_char_p, ctypes.c_int64)
        self.algorithm = self.function("algorithm", NUMBER, POINTER, SIZE)

    def all_reduce_call(self, handle: int, example: torch.Tensor) -> AllReduceCall:
        """all_reduce of `handle`, for two tensors as they come, on the GPU where `example` is."""
        module = native.python_module("_native_all_reduce")
        if module is None:
            index = example.get_device()
            return functools.partial(self._all_reduce_in_python, handle, index)
        call: AllReduceCall = module.AllReduceCall(self._all_reduce_address, handle, example).run
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
            return OTHERWISE
        status: int = self.all_reduce(
            handle, code, inp.data_ptr(), out.data_ptr(), inp.nbytes, current_stream(index)
        )
        return status

    def tune(self, handle: int, name: str, value: int) -> None:
        """Overrides one choice of the algorithms; must be the same on all ranks."""
        self.check(self.tune_(handle, name.encode(), value))


@functools.cache
def load() -> CustomArLibrary:
    """The library; NativeLibraryError when it is missing or cannot be loaded."""
    library = CustomArLibrary(str(native.load("cuda")))
    _register_fakes()
    return library


def _register_fakes() -> None:
    def nothing(fa: int, inp: torch.Tensor, out: torch.Tensor, *_: object, **__: object) -> None:
        torch._check(inp.dtype == out.dtype, lambda: "inp and out must have the same dtype")

    for name in ("all_reduce", "all_gather", "reduce_scatter"):
        torch.library.register_fake(f"communicators::custom_ar_{name}", nothing)
        keep(getattr(torch.ops.communicators, f"custom_ar_{name}").default)
