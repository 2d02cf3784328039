"""The systems that torch has, beside which ours are measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm

Call = Callable[[], object]


def gloo(op: str, x: Any, out: Any) -> Call:
    """A collective of the default process group on CPU tensors."""
    if op == "all_reduce":
        return lambda: dist.all_reduce(x)
    if op == "all_gather":
        gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return lambda: gather_into(out, x)
    if op == "gather":
        root = dist.get_rank() == 0
        parts = list(out.view(dist.get_world_size(), -1).unbind(0)) if root else None
        return lambda: dist.gather(x, parts, dst=0)
    if op == "all_to_all":
        return lambda: dist.all_to_all_single(out, x)
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return lambda: scatter(out, x)


def nccl(x: Any) -> tuple[Call, Any, Any]:
    """An all-reduce: the call, the tensor that it reads and the one that it writes."""
    return lambda: dist.all_reduce(x), x, x


def symmetric_memory(x: Any) -> tuple[Call, Any, Any]:
    """torch's two-shot all-reduce. Its input must lie in symmetric memory; a copy into it is not
    counted."""
    shared = symm.empty(x.numel(), dtype=x.dtype, device=x.device)
    world = dist.group.WORLD
    assert world is not None
    name = world.group_name
    symm.rendezvous(shared, name)
    return lambda: torch.ops.symm_mem.two_shot_all_reduce_(shared, "sum", name), shared, shared
