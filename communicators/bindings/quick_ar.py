"""ctypes over the C interface of the quantized all-reduce (native/collectives/quick_c_api.cu).

Under torch.compile the operator `torch.ops.communicators.quick_all_reduce` is used instead; its
fake is registered here.
"""

from __future__ import annotations

import functools

import torch

from ..groups.traced import keep
from . import native
from .collectives_library import NUMBER, POINTER, SIZE, CollectivesLibrary

#: quick::Codec
CODECS = ("FP", "Q8", "Q6", "Q4")


class QuickArLibrary(CollectivesLibrary):
    """The quantized all-reduce; the layout of `create` and `bytes` is (bytes of an area,)."""

    prefix = "communicators_qr"
    layout_sizes = 1

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.all_reduce = self.function(
            "all_reduce", NUMBER, POINTER, NUMBER, NUMBER, POINTER, POINTER, SIZE, POINTER
        )
        self.set_launch = self.function(
            "set_launch", NUMBER, POINTER, NUMBER, NUMBER, NUMBER, NUMBER
        )


@functools.cache
def load() -> QuickArLibrary:
    """The library; NativeLibraryError when it is missing or cannot be loaded."""
    library = QuickArLibrary(str(native.load("cuda")))
    register_fake()
    return library


@functools.cache
def register_fake() -> None:
    """What the operator is to a tracer; the CPU library, which has its schema, must be loaded."""

    @torch.library.register_fake("communicators::quick_all_reduce")
    def _(fa: int, inp: torch.Tensor, out: torch.Tensor, codec: int, order: object = None) -> None:
        torch._check(inp.dtype == out.dtype, lambda: "inp and out must have the same dtype")
        torch._check(inp.numel() == out.numel(), lambda: "inp and out must have the same size")

    keep(torch.ops.communicators.quick_all_reduce.default)
