"""What a forked child does with the groups of torch.distributed that its parent had.

Their threads and connections are the parent's: destroying them in the child would wait for threads
that are not there. So they are kept as they are, and set aside when the child opens groups of its
own.
"""

from __future__ import annotations

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch._C._distributed_c10d import _unregister_all_process_groups

from . import forks

torch_groups = False  # whether torch.distributed's groups are those of the parent


def forget_torch_groups() -> None:
    """Before a rendezvous of the child's own: torch.distributed is as if never initialised."""
    global torch_groups
    if not torch_groups:
        return
    torch_groups = False
    world = c10d._world
    c10d._update_default_pg(None)
    for table in (
        world.pg_map,
        world.pg_names,
        world.pg_group_ranks,
        world.pg_backend_config,
        world.tags_to_pg,
        world.pg_to_tag,
        world.pg_coalesce_state,
    ):
        table.clear()
    world.group_count = 0
    _unregister_all_process_groups()


def _after_fork() -> None:
    global torch_groups
    if dist.is_available() and dist.is_initialized():
        torch_groups = True
        world = c10d._world
        forks.keep(*world.pg_map, *world.pg_map.values())


forks.call_in_child(_after_fork)
