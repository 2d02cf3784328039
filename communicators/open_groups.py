"""The open groups of this process, and the operators by which a traced graph calls them.

torch.compile cannot trace into a communicator, so inside a traced function the coordinator calls
an operator that names the group; at run time the operator finds it here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from . import forks
from .errors import CommunicatorError

if TYPE_CHECKING:
    from .group_coordinator import GroupCoordinator

#: By name, "world", "tp", "pp" and the user's own.
OPEN_GROUPS: dict[str, GroupCoordinator] = {}


def _after_fork() -> None:
    """In the child, which may open groups of its own."""
    for group in OPEN_GROUPS.values():
        group.after_fork()
    OPEN_GROUPS.clear()


forks.call_in_child(_after_fork)


def open_group(name: str) -> GroupCoordinator:
    """The open group `name` that this rank is in; CommunicatorError when there is none."""
    try:
        return OPEN_GROUPS[name]
    except KeyError:
        raise CommunicatorError(
            f"this rank has no open group {name!r}; open are: {', '.join(OPEN_GROUPS) or 'none'} "
            "(init_distributed_environment and initialize_model_parallel open groups)"
        ) from None


@torch.library.custom_op("communicators::group_all_reduce", mutates_args=())
def _group_all_reduce(x: torch.Tensor, group: str, exact: bool = False) -> torch.Tensor:
    return open_group(group).all_reduce(x, exact=exact)


@_group_all_reduce.register_fake
def _(x: torch.Tensor, group: str, exact: bool = False) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("communicators::group_all_gather", mutates_args=())
def _group_all_gather(x: torch.Tensor, dim: int, world_size: int, group: str) -> torch.Tensor:
    return open_group(group).all_gather(x, dim).clone()


@_group_all_gather.register_fake
def _(x: torch.Tensor, dim: int, world_size: int, group: str) -> torch.Tensor:
    shape = list(x.shape) or [1]
    shape[dim] *= world_size
    return x.new_empty(shape)
