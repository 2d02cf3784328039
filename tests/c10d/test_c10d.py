"""The torch.distributed backend on the CPU: every call against what it means, and its clients."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn

import communicators.c10d
from communicators import CommMismatchError, InvalidArgumentError, PeerDiedError
from tests.ranks import Rank, pool, run_fresh

OPS: dict[Any, Any] = {
    dist.ReduceOp.SUM: torch.add,
    dist.ReduceOp.PRODUCT: torch.mul,
    dist.ReduceOp.MIN: torch.minimum,
    dist.ReduceOp.MAX: torch.maximum,
    dist.ReduceOp.BAND: torch.bitwise_and,
    dist.ReduceOp.BOR: torch.bitwise_or,
    dist.ReduceOp.BXOR: torch.bitwise_xor,
}
# torch 2.13 renamed these two.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool)


@contextlib.contextmanager
def world(rank: Rank, key: str, timeout_s: float = 30.0) -> Iterator[Any]:
    dist.init_process_group(
        communicators.c10d.BACKEND,
        store=dist.PrefixStore(key, rank.store()),
        rank=rank.rank,
        world_size=rank.world_size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def of(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What rank `rank` gives; every rank can make everybody's. Sums of few are exact."""
    generator = torch.Generator().manual_seed(rank + 7 * len(shape))
    x = torch.randint(0, 2 if dtype == torch.bool else 5, shape, generator=generator)
    return x.to(dtype)


def reductions(rank: Rank) -> None:
    w = rank.world_size
    with world(rank, "reductions") as group:
        assert group.explain().endswith("cpu_shm; send and recv: gloo"), group.explain()
        for dtype, (op, step) in itertools.product((*FLOATS, *INTEGERS), OPS.items()):
            if dtype.is_floating_point and step.__name__.startswith("bitwise"):
                with pytest.raises(InvalidArgumentError, match="integers and bool"):
                    dist.all_reduce(of(0, 4, dtype=dtype), op)
                continue
            for shape in ((), (1,), (5, 7), (40_001,)):
                expected = of(0, *shape, dtype=dtype)
                for peer in range(1, w):
                    expected = step(expected, of(peer, *shape, dtype=dtype))
                x = of(rank.rank, *shape, dtype=dtype)
                dist.all_reduce(x, op)
                assert torch.equal(x, expected), (dtype, op, shape)
                x = of(rank.rank, *shape, dtype=dtype)
                before = x.clone()
                dist.reduce(x, w - 1, op)
                assert torch.equal(x, expected if rank.rank == w - 1 else before)
        x = torch.full((3,), float(rank.rank))
        dist.all_reduce(x, dist.ReduceOp.AVG)
        assert torch.equal(x, torch.full((3,), (w - 1) / 2))
        z = torch.complex(of(rank.rank, 4), of(rank.rank + w, 4))
        dist.all_reduce(z)
        assert torch.equal(z.real, sum(of(p, 4) for p in range(w)))
        wide = torch.zeros(4, 6)
        wide[:, ::2] = 1
        dist.all_reduce(wide[:, ::2])
        assert torch.equal(wide, torch.tensor([w, 0.0] * 3).expand(4, 6))
        with pytest.raises(InvalidArgumentError, match="are accepted"):
            dist.all_reduce(x, dist._make_nccl_premul_sum(2.0))
        dist.all_reduce(x)  # still in step


@pytest.mark.parametrize("ranks", [2, 3])
def test_reductions(ranks: int) -> None:
    pool(ranks).run(reductions)


def moves(rank: Rank) -> None:
    w, me = rank.world_size, rank.rank
    with world(rank, "moves"):
        for n in (1, 6, 70_000):
            every = [of(p, n, 2) for p in range(w)]
            mine = every[me]
            parts = [torch.empty_like(mine) for _ in range(w)]
            dist.all_gather(parts, mine)
            assert all(map(torch.equal, parts, every))
            whole = torch.empty(w * n, 2)
            all_gather_single(whole, mine)
            assert torch.equal(whole, torch.cat(every))
            uneven = [torch.empty(p + n) for p in range(w)]
            dist.all_gather(uneven, torch.full((me + n,), float(me)))
            assert all(torch.equal(x, torch.full((p + n,), float(p))) for p, x in enumerate(uneven))
            got = [torch.empty_like(mine) for _ in range(w)] if me == 1 else None
            dist.gather(mine, got, dst=1)
            assert got is None or all(map(torch.equal, got, every))
            x = torch.empty_like(mine)
            dist.scatter(x, every if me == 0 else None, src=0)
            assert torch.equal(x, mine)
            x = mine.clone()
            dist.broadcast(x, w - 1)
            assert torch.equal(x, every[-1])
            lists = [[of(10 * p + q, n, 2) for q in range(w)] for p in range(w)]  # of p, to q
            total = sum(lists[p][me] for p in range(w))
            dist.reduce_scatter(x, list(lists[me]))
            assert torch.equal(x, total)
            reduce_scatter_single(x, torch.cat(lists[me]))
            assert torch.equal(x, total)
            outs = [torch.empty_like(mine) for _ in range(w)]
            dist.all_to_all(outs, list(lists[me]))
            assert all(torch.equal(outs[p], lists[p][me]) for p in range(w))
            whole = torch.empty(w * n, 2)
            dist.all_to_all_single(whole, torch.cat(lists[me]))
            assert torch.equal(whole, torch.cat([lists[p][me] for p in range(w)]))
            sizes = [[(p + 2 * q) % 3 * n for q in range(w)] for p in range(w)]  # 0 among them
            give = torch.cat([torch.full((sizes[me][q],), 10.0 * me + q) for q in range(w)])
            take = torch.empty(sum(sizes[p][me] for p in range(w)))
            dist.all_to_all_single(take, give, [sizes[p][me] for p in range(w)], sizes[me])
            assert torch.equal(
                take, torch.cat([torch.full((sizes[p][me],), 10.0 * p + me) for p in range(w)])
            )
        objects: list[Any] = [None] * w
        dist.all_gather_object(objects, {"rank": me})
        assert objects == [{"rank": p} for p in range(w)]
        works = [dist.isend(torch.full((2,), 1.0 * t), (me + 1) % w, tag=t) for t in (5, 3)]
        for tag in (3, 5):  # in another order than they were sent
            x = torch.empty(2)
            dist.recv(x, (me - 1) % w, tag=tag)
            assert torch.equal(x, torch.full((2,), 1.0 * tag))
        for work in works:
            work.wait()
        dist.barrier()
        dist.group.WORLD.monitored_barrier()  # dist.monitored_barrier() asks for gloo by name


@pytest.mark.parametrize("ranks", [2, 3])
def test_moves(ranks: int) -> None:
    pool(ranks).run(moves)


def groups_in_any_order(rank: Rank) -> None:
    me = rank.rank
    with world(rank, "order"):
        groups = [dist.new_group([0, 1]) for _ in range(4)]
        tensors = [torch.full((30_000,), 1.0 + i) for i in range(4)]
        order = range(4) if me == 0 else reversed(range(4))
        works = {i: dist.all_reduce(tensors[i], group=groups[i], async_op=True) for i in order}
        for i in range(4):
            works[i].wait()
            assert works[i].is_completed() and works[i].is_success()
            assert torch.equal(tensors[i], torch.full((30_000,), 2.0 + 2 * i))
        future = dist.all_reduce(tensors[0], group=groups[0], async_op=True).get_future()
        assert torch.equal(future.wait()[0], torch.full((30_000,), 4.0))
        alone = dist.new_group([1])
        if me == 1:
            dist.all_reduce(tensors[1], group=alone)
        for i in (2, 0, 3, 1):
            dist.destroy_process_group(groups[i])
        dist.barrier()


def test_groups_in_any_order() -> None:
    pool(2).run(groups_in_any_order)


def many_groups(rank: Rank) -> int:
    import resource

    with world(rank, "many"):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
        try:
            groups = [dist.new_group([0, 1]) for _ in range(64)]
            for group in groups:
                dist.barrier(group)
            held = len(os.listdir("/proc/self/fd"))
            for group in groups:
                dist.destroy_process_group(group)
            return held
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_64_groups_within_1024_open_files() -> None:
    assert max(pool(2).run(many_groups)) < 1024


def other_calls(rank: Rank) -> None:
    with world(rank, "mismatch"):
        x = torch.ones(8)
        with pytest.raises(CommMismatchError, match="all_reduce"):
            dist.all_reduce(x) if rank.rank == 0 else dist.broadcast(x, 0)
        with pytest.raises(CommMismatchError):
            dist.all_reduce(x, async_op=True).wait()


def test_other_calls_are_told() -> None:
    pool(2).run(other_calls)


def dies(rank: Rank) -> str:
    with world(rank, "dies", timeout_s=60):
        x = torch.ones(8)
        dist.all_reduce(x)
        if rank.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        work = dist.all_reduce(x, async_op=True)
        with pytest.raises(PeerDiedError, match="rank 1"):
            work.wait()
        assert isinstance(work.exception(), PeerDiedError)
        with pytest.raises(PeerDiedError):
            dist.all_reduce(x)
        return "told"


def test_a_killed_peer_is_named_by_the_work() -> None:
    first, second = run_fresh(2, dies)
    assert first.value == "told", first
    assert second.killed


# --- clients --------------------------------------------------------------------------------------


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


def data(rank: int) -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(100 + rank))


def clients(rank: Rank) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )
    from torch.nn.parallel import DistributedDataParallel

    w, me = rank.world_size, rank.rank
    with world(rank, "clients"):
        mesh = init_device_mesh("cpu", (w,))
        # Tensor parallel, eager and compiled.
        expected = model()(data(0))
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallel = parallelize_module(model(), mesh, plan)
        assert torch.allclose(parallel(data(0)), expected, atol=1e-6)
        compiled = torch.compile(parallel, backend="aot_eager")
        assert torch.allclose(compiled(data(0)), expected, atol=1e-6)
        # DTensor through every pair of placements.
        full = torch.arange(24.0).view(6, 4)
        for here, there in itertools.product((Shard(0), Shard(1), Replicate()), repeat=2):
            x = DTensor.from_local(
                full.tensor_split(w, here.dim)[me] if isinstance(here, Shard) else full,
                mesh, [here], shape=full.shape, stride=full.stride(),
            )  # fmt: skip
            assert torch.equal(x.redistribute(mesh, [there]).full_tensor(), full), (here, there)
        partial = DTensor.from_local(full, mesh, [Partial()])
        assert torch.equal(partial.full_tensor(), w * full)
        # Functional collectives.
        x = functional.all_reduce(torch.ones(3), "sum", dist.group.WORLD)
        assert torch.equal(x + 0, torch.full((3,), 1.0 * w))

        # Training: as one process on all the data.
        def step(m: nn.Module, batch: torch.Tensor) -> torch.Tensor:
            optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                m(batch).square().mean().backward()
                optimizer.step()
            return m(data(9)).detach()

        alone = step(model(), torch.cat([data(p) for p in range(w)]))
        assert torch.allclose(step(DistributedDataParallel(model()), data(me)), alone, atol=1e-6)
        sharded = fully_shard(model(), mesh=mesh)
        assert torch.allclose(step(sharded, data(me)), alone, atol=1e-6)


def test_dtensor_ddp_and_fsdp() -> None:
    pool(2).run(clients)


def other_layouts(rank: Rank) -> None:
    """Results that lie transposed, which no flat view describes."""
    w, me = rank.world_size, rank.rank
    with world(rank, "other layouts"):
        whole = torch.arange(6.0 * w).view(w, 2, 3)
        out = torch.empty(3, 2).t()
        dist.scatter(out, list((whole + 1).unbind(0)) if me == 0 else None, src=0)
        assert torch.equal(out, whole[me] + 1)
        reduce_scatter_single(out, whole)
        assert torch.equal(out, whole[me] * w)
        gathered = torch.empty(3, 2 * w).t()
        all_gather_single(gathered, whole[me])
        assert torch.equal(gathered, whole.view(2 * w, 3))
        exchanged = torch.empty(3, w).t()
        dist.all_to_all_single(exchanged, whole[:, 0] + 100 * me)
        assert torch.equal(exchanged, whole[me, 0] + 100 * torch.arange(w).view(w, 1))


@pytest.mark.parametrize("world_size", [2, 3])
def test_results_of_other_layouts(world_size: int) -> None:
    pool(world_size).run(other_layouts)
