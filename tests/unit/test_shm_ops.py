"""The shared-memory operators as torch operators: schemas, fakes, torch.compile."""

from __future__ import annotations

import torch

from tests.ranks import Rank, pool
from tests.unit.test_shm_collectives import communicator


def run_opcheck(rank: Rank) -> None:
    handle = communicator(rank)._handle
    ops = torch.ops.communicators
    w = rank.world_size
    x = torch.arange(12.0).view(3, 4)
    cases = [
        (ops.shm_all_reduce_, (x.clone(), handle)),
        (ops.shm_all_reduce_out, (torch.empty_like(x), x, handle)),
        (ops.shm_all_reduce, (x, handle)),
        (ops.shm_all_gather, (x.new_empty(3 * w, 4), x, 12, handle)),
        (ops.shm_gather, (x.new_empty(3 * w, 4) if rank.rank == 0 else None, x, 12, 0, handle)),
        (ops.shm_reduce_scatter, (x.new_empty(3, 2), x, 2, handle)),
        (ops.shm_broadcast_, (x.clone(), 0, handle)),
    ]
    # test_aot_dispatch_* runs an op a different number of times on each path, the same on all
    # ranks, so the ranks stay together.
    for op, arguments in cases:
        torch.library.opcheck(op.default, arguments)


def test_opcheck() -> None:
    pool(2).run(run_opcheck, deadline_s=120)


def compiled(rank: Rank) -> None:
    handle = communicator(rank)._handle
    ops = torch.ops.communicators

    def layer(x: torch.Tensor) -> torch.Tensor:
        y = ops.shm_all_reduce(x * 2, handle) + 1
        ops.shm_all_reduce_(y, handle)
        out = y.new_empty(2 * y.shape[0], y.shape[1])
        ops.shm_all_gather(out, y, y.numel(), handle)
        return out.relu()

    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(rank.rank))
    eager = layer(x)
    traced = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(eager, traced)
    assert not torch.equal(eager, x.new_zeros(eager.shape))


def test_compile_fullgraph() -> None:
    pool(2).run(compiled, deadline_s=180)
