"""Reductions besides sums of the usual dtypes: each rank's part is gathered and reduced here.

In rank order, with torch's own operators, so every rank has the same bits; NaN travels as in torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from ..errors import InvalidArgumentError

#: Elements that are gathered at a time, of each rank: bounds the memory.
_CHUNK = 1 << 20

_STEPS: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    ReduceOp.SUM: torch.add,
    ReduceOp.PRODUCT: torch.mul,
    ReduceOp.MIN: torch.minimum,
    ReduceOp.MAX: torch.maximum,
    ReduceOp.BAND: torch.bitwise_and,
    ReduceOp.BOR: torch.bitwise_or,
    ReduceOp.BXOR: torch.bitwise_xor,
}
_BITWISE = (ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR)


def kind(call: str, reduce_op: Any, x: Tensor, rank: int) -> Any:
    """The RedOpType of `reduce_op`; InvalidArgumentError if it cannot be done with `x`'s dtype."""
    op = getattr(reduce_op, "op", reduce_op)
    given = f"{call}(tensor, op={op}) on rank {rank}"
    if op != ReduceOp.AVG and op not in _STEPS:
        names = ", ".join(sorted(step.name for step in [*_STEPS, ReduceOp.AVG]))
        raise InvalidArgumentError(f"{given}: {names} are accepted")
    if op in _BITWISE and (x.is_floating_point() or x.is_complex()):
        raise InvalidArgumentError(
            f"{given}: it takes integers and bool, and the tensor is of {x.dtype}"
        )
    if op in (ReduceOp.MIN, ReduceOp.MAX) and x.is_complex():
        raise InvalidArgumentError(f"{given}: complex numbers have no order")
    return op


def reduce(op: Any, x: Tensor, world_size: int, gather: Callable[[Tensor, Tensor], None]) -> None:
    """Reduces the flat `x` over the ranks, in place.

    Args:
        gather: writes every rank's second argument into the first one, [W, n].
    """
    for part in x.split(_CHUNK):
        parts = part.new_empty([world_size, part.numel()])
        gather(parts, part)
        total = parts[0]
        for rank in range(1, world_size):
            total = _STEPS[op](total, parts[rank])
        part.copy_(total)


def average(x: Tensor, world_size: int) -> None:
    """Divides the sum, in place; integers are rounded towards zero, as NCCL does."""
    if x.is_floating_point() or x.is_complex():
        x.div_(world_size)
    else:
        x.div_(world_size, rounding_mode="trunc")
