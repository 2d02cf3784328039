"""ctypes over the C interface of the CUDA library's collectives (native/collectives/c_api.cu).

A call through ctypes costs about a microsecond less than one through torch's operator dispatch.
Under torch.compile the operators `torch.ops.communicators.custom_ar_*` are used instead; their
fakes are registered here.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from .. import native
from .collectives_library import NUMBER, POINTER, SIZE, CollectivesLibrary

#: collectives::Dtype
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

#: collectives::Algorithm
ALGORITHMS = ("automatic", "one_shot", "streamed", "two_shot", "copy_engine")


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
        self.tune_ = self.function("tune", NUMBER, POINTER, ctypes.c_char_p, ctypes.c_int64)
        self.algorithm = self.function("algorithm", NUMBER, POINTER, SIZE)

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
    def nothing(fa: int, inp: torch.Tensor, out: torch.Tensor, world: int = 1) -> None:
        torch._check(inp.dtype == out.dtype, lambda: "inp and out must have the same dtype")

    for name in ("all_reduce", "all_gather", "reduce_scatter"):
        torch.library.register_fake(f"communicators::custom_ar_{name}", nothing)
