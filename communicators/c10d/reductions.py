"""Reductions besides sums of the usual dtypes: each rank's part is gathered and reduced here.

In rank order, with torch's own operators, so every rank has the same bits; NaN travels as in torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from ..errors import InvalidArgumentError

#: Elements that are gathered at a time, of each rank: bounds the memory.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Kind:
    """A reduction, and what it takes."""

    name: str
    step: Callable[[Tensor, Tensor], Tensor]
    summed: bool = False
    averaged: bool = False
    integers: bool = False  # alone, and bool
    ordered: bool = False  # not complex


def _number(op: Any) -> int:
    return int(op)


#: By number, since torch's enums take microseconds to compare.
_KINDS = {
    _number(ReduceOp.SUM): Kind("SUM", torch.add, summed=True),
    _number(ReduceOp.AVG): Kind("AVG", torch.add, summed=True, averaged=True),
    _number(ReduceOp.PRODUCT): Kind("PRODUCT", torch.mul),
    _number(ReduceOp.MIN): Kind("MIN", torch.minimum, ordered=True),
    _number(ReduceOp.MAX): Kind("MAX", torch.maximum, ordered=True),
    _number(ReduceOp.BAND): Kind("BAND", torch.bitwise_and, integers=True),
    _number(ReduceOp.BOR): Kind("BOR", torch.bitwise_or, integers=True),
    _number(ReduceOp.BXOR): Kind("BXOR", torch.bitwise_xor, integers=True),
}


def kind(call: str, reduce_op: Any, x: Tensor, rank: int) -> Kind:
    """What `reduce_op` stands for; InvalidArgumentError if it cannot be done with `x`'s dtype."""
    op = getattr(reduce_op, "op", reduce_op)
    found = _KINDS.get(_number(op))
    if found is not None and not (found.integers or found.ordered):
        return found
    given = f"{call}(tensor, op={op}) on rank {rank}"
    if found is None:
        names = ", ".join(sorted(known.name for known in _KINDS.values()))
        raise InvalidArgumentError(f"{given}: {names} are accepted")
    if found.integers and (x.is_floating_point() or x.is_complex()):
        raise InvalidArgumentError(
            f"{given}: it takes integers and bool, and the tensor is of {x.dtype}"
        )
    if found.ordered and x.is_complex():
        raise InvalidArgumentError(f"{given}: complex numbers have no order")
    return found


def reduce(
    kind: Kind, x: Tensor, world_size: int, gather: Callable[[Tensor, Tensor], None]
) -> None:
    """Reduces the flat `x` over the ranks, in place.

    Args:
        gather: writes every rank's second argument into the first one, [W, n].
    """
    for part in x.split(_CHUNK):
        parts = part.new_empty([world_size, part.numel()])
        gather(parts, part)
        total = parts[0]
        for rank in range(1, world_size):
            total = kind.step(total, parts[rank])
        part.copy_(total)


def average(x: Tensor, world_size: int) -> None:
    """Divides the sum, in place; integers are rounded towards zero, as NCCL does."""
    if x.is_floating_point() or x.is_complex():
        x.div_(world_size)
    else:
        x.div_(world_size, rounding_mode="trunc")
