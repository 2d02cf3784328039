"""All ranks go on, or all ranks raise the same error: nobody waits for one that gave up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError

from .errors import JobError

T = TypeVar("T")


class AgreedError(JobError):
    """One or more ranks failed, and every rank raises this with the same text."""


def together(tp: Any, step: Callable[[], T]) -> T:
    """Run ``step`` on every rank of ``tp``; return its result, or raise on all ranks.

    ``step`` must not communicate. An error in it (a JobError, a file that cannot be read, memory
    that is not there) on any rank becomes an AgreedError on all; the text names the ranks unless
    all of them say the same.
    """
    result, mine = None, ""
    cause: Exception | None = None
    try:
        result = step()
    except (RuntimeError, OSError, MemoryError, SafetensorError) as error:
        mine = str(error) if isinstance(error, JobError) else f"{type(error).__name__}: {error}"
        cause = error
    failed = torch.tensor([float(bool(mine))], device=tp.device)
    flags = tp.all_gather(failed, dim=0).tolist()
    if not any(flags):
        return result  # type: ignore[return-value]
    texts = {
        rank: tp.broadcast_object(mine if rank == tp.rank_in_group else None, src=rank)
        for rank, flag in enumerate(flags)
        if flag
    }
    if len(set(texts.values())) == 1 and len(texts) == tp.world_size:
        raise AgreedError(next(iter(texts.values()))) from cause
    raise AgreedError("; ".join(f"rank {r}: {text}" for r, text in texts.items())) from cause
