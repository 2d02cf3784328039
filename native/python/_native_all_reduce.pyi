"""An all-reduce of GPU tensors in one call, in `_native_cpu.so` (all_reduce_call.cpp)."""

from torch import Tensor

version: str

class AllReduceCall:
    def __new__(cls, function: int, handle: int, example: Tensor, /) -> AllReduceCall: ...
    def run(self, inp: Tensor, out: Tensor, /) -> int: ...
