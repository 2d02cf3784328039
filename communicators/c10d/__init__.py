"""A torch.distributed backend over the library's collectives.

    import communicators.c10d
    dist.init_process_group("communicators")                # or
    dist.new_group(ranks, backend="communicators")

Importing it registers the backend; process_group.py is the group that torch then makes.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from .process_group import ProcessGroup

__all__ = ["BACKEND", "ProcessGroup", "register"]

#: The name under which torch.distributed knows it.
BACKEND = "communicators"


def _create(options: Any, _: Any) -> ProcessGroup:
    return ProcessGroup(
        options.store,
        options.group_rank,
        options.group_size,
        options.timeout,
        name=options.group_id,
        ranks=list(options.global_ranks_in_group),
    )


def register() -> None:
    """Makes the backend known to torch.distributed. Idempotent; importing this module calls it, and
    torch 2.14 and newer find it by its entry point (torch.distributed.backends)."""
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu"])


register()
