"""Checks of arguments of collectives; each raises InvalidArgumentError, in a whole sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .errors import InvalidArgumentError


def check_dim(call: str, x: torch.Tensor, dim: int) -> int:
    """`dim` as 0..ndim-1; a negative one counts from the end. A 0-dim tensor has dim 0."""
    ndim = max(x.dim(), 1)
    if not -ndim <= dim < ndim:
        raise InvalidArgumentError(
            f"{call}(x, dim={dim}): x {list(x.shape)} has dims {-ndim}..{ndim - 1}"
        )
    return dim % ndim


def check_sizes(
    call: str, x: torch.Tensor, sizes: Sequence[int], world_size: int, total: int | None = None
) -> None:
    """One size >= 0 a rank; with `total`, they add up to it."""
    wrong_total = total is not None and sum(sizes) != total
    if len(sizes) != world_size or min(sizes) < 0 or wrong_total:
        with_sum = "" if total is None else f" with sum {total}"
        raise InvalidArgumentError(
            f"{call}(x, sizes={list(sizes)}): {world_size} sizes >= 0{with_sum} are expected for "
            f"x {list(x.shape)}"
        )


def check_root(call: str, argument: str, rank: int, world_size: int) -> None:
    """A rank of the group."""
    if not 0 <= rank < world_size:
        raise InvalidArgumentError(
            f"{call}({argument}={rank}): the ranks of this group are 0..{world_size - 1}"
        )


def check_peer(call: str, argument: str, rank: int, own: int, world_size: int) -> None:
    """Another rank of the group."""
    check_root(call, argument, rank, world_size)
    if rank == own:
        raise InvalidArgumentError(f"{call}({argument}={rank}): that is this rank itself")


def check_mapping(call: str, tensors: Any, own: int) -> None:
    """A dict, or another mapping."""
    if not isinstance(tensors, Mapping):
        raise InvalidArgumentError(
            f"{call}(tensors): a dict is expected on rank {own}, and a {type(tensors).__name__} "
            "was given"
        )
