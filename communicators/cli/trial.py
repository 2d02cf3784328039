"""One rank of the doctor's trial group: sums a tensor, checks it, prints what it uses.

Arguments: the store, seconds that a wait may take, and "cpu" or, for one GPU per rank, "cuda".
"""

from __future__ import annotations

import os
import sys

import torch

from .. import parallel_state


def main(store: str, timeout_s: str, device_type: str) -> int:
    os.environ["COMMUNICATORS_TIMEOUT_S"] = timeout_s
    device = "cpu" if device_type == "cpu" else f"cuda:{os.environ['LOCAL_RANK']}"
    world = parallel_state.init_distributed_environment(
        distributed_init_method=store, device=device
    )
    x = torch.full((1000,), float(world.rank + 1), device=world.device)
    expected = world.world_size * (world.world_size + 1) / 2
    result = world.all_reduce(x)
    if not bool((result == expected).all()):
        print(f"the sum is {result.unique().tolist()}, and {expected} is right", file=sys.stderr)
        return 1
    if world.is_first_rank:
        print(world.explain())
    world.barrier()
    parallel_state.destroy_distributed_environment()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
