"""What PyNcclCommunicator checks before NCCL does: equal libraries, one GPU per rank, shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...bindings.pynccl_wrapper import format_version
from ...errors import CommMismatchError, CommunicatorError, InvalidArgumentError
from ...groups.group import Group
from .peer_watch import ProcessId


@dataclass(frozen=True)
class NcclHandle:
    """What one rank tells the others: its NCCL, GPU and process, and rank 0 the id to meet by."""

    version: int
    gpu: str
    unique_id: bytes
    process: ProcessId


def check_handles(handles: Sequence[NcclHandle]) -> None:
    first_rank: dict[str, int] = {}
    for rank, handle in enumerate(handles):
        if handle.version != handles[0].version:
            raise CommMismatchError(
                f"rank 0 has NCCL {format_version(handles[0].version)} and rank {rank} has NCCL "
                f"{format_version(handle.version)}; all ranks must load the same"
            )
        if handle.gpu and handle.gpu in first_rank:
            raise CommunicatorError(
                f"rank {first_rank[handle.gpu]} and {rank} are both on GPU-{handle.gpu}; NCCL "
                "takes one GPU a rank"
            )
        first_rank[handle.gpu] = rank


def check_same(call: str, name: str, given: torch.Tensor, like: torch.Tensor) -> None:
    if given.shape != like.shape or given.dtype != like.dtype:
        raise InvalidArgumentError(
            f"{call}: {name} is {tuple(given.shape)} of {given.dtype}; it must be "
            f"{tuple(like.shape)} of {like.dtype}, as the input is"
        )


def check_parts(call: str, whole: torch.Tensor, part: torch.Tensor, world_size: int) -> None:
    if whole.numel() != world_size * part.numel() or whole.dtype != part.dtype:
        raise InvalidArgumentError(
            f"{call}: the whole has {whole.numel()} elements of {whole.dtype} and one part "
            f"{part.numel()} of {part.dtype}; {world_size} ranks need exactly {world_size} parts"
        )


def check_ragged(
    call: str, sizes: list[int], group: Group, whole: torch.Tensor, part: torch.Tensor
) -> None:
    rows = whole.shape[0], part.shape[0]
    expected = sum(sizes), sizes[group.rank] if len(sizes) == group.world_size else None
    if rows != expected or whole.shape[1:] != part.shape[1:] or whole.dtype != part.dtype:
        raise InvalidArgumentError(
            f"{call}: sizes={sizes} on rank {group.rank} of {group.world_size} do not fit a whole "
            f"of {tuple(whole.shape)} and a part of {tuple(part.shape)}"
        )
