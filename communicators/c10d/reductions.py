"""Which of the library's reductions a torch ReduceOp stands for, for a tensor's dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from ..base import BY
from ..errors import InvalidArgumentError
from ..groups.arguments import reducible

#: By number, since torch's enums take microseconds to compare.
_NAMES = {int(getattr(ReduceOp, name.upper())): name for name in BY}


def by_of(call: str, reduce_op: Any, x: Tensor, rank: int) -> str:
    """One of base.BY; InvalidArgumentError if it cannot be done with `x`'s dtype."""
    number = getattr(reduce_op, "op", reduce_op)
    by = _NAMES.get(int(number))
    if by == "sum" and x.dtype is torch.bool:
        by = "bor"  # whether any is true, as NCCL's backend has it
    if by is not None and reducible(by, x.dtype):
        return by
    given = f"{call}(tensor, op={number}) on rank {rank}"
    if by is None:
        raise InvalidArgumentError(f"{given}: {', '.join(BY).upper()} are accepted")
    if x.is_complex() and by in ("min", "max"):
        raise InvalidArgumentError(f"{given}: complex numbers have no order")
    if x.dtype is torch.bool:
        raise InvalidArgumentError(f"{given}: truth values have no average")
    raise InvalidArgumentError(
        f"{given}: it takes integers and bool, and the tensor is of {x.dtype}"
    )
