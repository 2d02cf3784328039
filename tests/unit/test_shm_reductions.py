"""Reductions besides the sum, reduce, scatter and all_to_all over CPU shared memory, bit for bit
against plain torch in rank order; the same through the coordinator, and over gloo."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from communicators import CommunicatorError, CpuCommunicator, Settings
from communicators.backends.torch_distributed import TorchDistributedCommunicator
from communicators.base import BITS, BY
from communicators.errors import InvalidArgumentError
from communicators.groups.arguments import reducible
from tests.gpu.virtual_ranks import same_bits
from tests.ranks import Rank, pool, run_fresh
from tests.unit.test_group_coordinator import world_of
from tests.unit.test_shm_collectives import DTYPES, communicator, inputs

ALL_DTYPES = (*DTYPES, torch.bool)
#: Elements: beside the flag, a block and one more, around one-shot, several chunks, odd.
SIZES = (1, 7, 1025, 40_003, 300_007)
STEPS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": torch.add,
    "avg": torch.add,
    "product": torch.mul,
    "min": torch.minimum,
    "max": torch.maximum,
    "band": torch.bitwise_and,
    "bor": torch.bitwise_or,
    "bxor": torch.bitwise_xor,
}


def parts_of(world: int, size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    if dtype is torch.bool:
        return [x > 0 for x in inputs(world, size, torch.int8, size)]
    parts = inputs(world, size, dtype, size)
    if dtype.is_floating_point and size > 4:
        parts[-1][1], parts[0][3] = torch.nan, torch.inf
    return parts


def reference(parts: list[torch.Tensor], by: str) -> torch.Tensor:
    dtype = parts[0].dtype
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = STEPS[by](total, part.to(wide))
    if by == "avg":
        whole = None if dtype.is_floating_point else "trunc"
        total = torch.div(total, len(parts), rounding_mode=whole)
    return total.to(dtype)


def check_reductions(rank: Rank, by: str) -> None:
    cpu, w, me = communicator(rank), rank.world_size, rank.rank
    for dtype in (one for one in ALL_DTYPES if reducible(by, one)):
        for size in SIZES:
            parts = parts_of(w, size, dtype)
            expected, mine = reference(parts, by), parts[me].clone()
            out = torch.empty_like(mine)
            cpu.run("all_reduce", out, mine, 0, by)
            assert same_bits(out, expected), (dtype, size)
            assert same_bits(mine, parts[me]), "the input changed"
            cpu.run("all_reduce", mine, mine, 0, by)
            assert same_bits(mine, expected), (dtype, size, "in place")
            root = size % w
            target = torch.empty_like(mine) if me == root else None
            cpu.run("reduce", target, parts[me], root, by)
            assert target is None or same_bits(target, expected), (dtype, size, "reduce")
            whole = parts_of(w, size * w, dtype)
            out = torch.empty_like(mine)
            cpu.run("reduce_scatter", out, whole[me], 0, by)
            assert same_bits(out, reference(whole, by)[me * size : (me + 1) * size]), (dtype, size)


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_reductions(world: int, by: str) -> None:
    pool(world).run(check_reductions, by)


def check_refused(rank: Rank) -> None:
    cpu, x = communicator(rank), torch.ones(4)
    for by in BITS:
        with pytest.raises(InvalidArgumentError, match=f"float32 cannot be reduced by {by}; bo"):
            cpu.run("all_reduce", x, x, 0, by)
    for by, how in (("sum", "summed"), ("avg", "averaged")):
        with pytest.raises(InvalidArgumentError, match=f"bool cannot be {how}"):
            cpu.run("all_reduce", x.bool(), x.bool(), 0, by)
    with pytest.raises(InvalidArgumentError, match=r"base\.BY"):
        cpu.run("all_reduce", x, x, 0, "mean")
    with pytest.raises(InvalidArgumentError, match="float8_e4m3fn cannot be reduced by max"):
        cpu.run("all_reduce", x.to(torch.float8_e4m3fn), x.to(torch.float8_e4m3fn), 0, "max")
    splits: Any
    for splits in (([4], [4]), ([5, -1], [2, 2]), ([2, 2], [2, 3])):
        with pytest.raises(InvalidArgumentError, match="all_to_all"):
            cpu.run("all_to_all", torch.empty(4), x, 0, "sum", splits)
    cpu.run("all_reduce", x, x, 0, "max")  # still in step
    assert x.tolist() == [1.0] * 4


def test_what_has_no_such_reduction_is_refused() -> None:
    pool(2).run(check_refused)


def check_scatter(rank: Rank) -> None:
    cpu, w, me = communicator(rank), rank.world_size, rank.rank
    for root in range(w):
        for dtype, size in ((torch.float32, 3), (torch.uint8, 100_001), (torch.int64, 300_000)):
            (whole, *_) = inputs(w, w * size, dtype, size + root)
            out = torch.empty(size, dtype=dtype)
            cpu.run("scatter", out, whole if me == root else None, root)
            assert torch.equal(out, whole[me * size : (me + 1) * size]), (root, dtype, size)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_scatter(world: int) -> None:
    pool(world).run(check_scatter)


def table_of_splits(world: int, kind: str, seed: int) -> list[list[int]]:
    """Elements that rank p sends to rank q."""
    make = random.Random(seed)
    return [
        [
            {
                "equal": 1000,
                "small": make.randrange(20),
                "some none": make.choice((0, 0, 5, 40_000)),
                "large": make.randrange(300_000),
                "one to all": 200_000 + q if p == 0 else 0,
                "all to one": 100_000 + p if q == world - 1 else 0,
                "mixed": 3 if p else 150_000,
                "nothing": 0,
            }[kind]
            for q in range(world)
        ]
        for p in range(world)
    ]


KINDS = ("equal", "small", "some none", "large", "one to all", "all to one", "mixed", "nothing")


def check_all_to_all(rank: Rank, threads: int) -> None:
    cpu, w, me = communicator(rank), rank.world_size, rank.rank
    tune = torch.ops.communicators.shm_set_tuning
    cpu.barrier()
    tune(cpu._handle, 64 << 10, 16384 if threads == 2 else 256 << 10, threads)
    for seed, kind in enumerate(KINDS):
        table = table_of_splits(w, kind, seed)
        for dtype in (torch.float32, torch.uint8, torch.bfloat16):
            sent = [inputs(w, sum(row), dtype, seed)[p] for p, row in enumerate(table)]
            come = [row[me] for row in table]
            expected = torch.cat([x.split(row)[me] for x, row in zip(sent, table, strict=True)])
            out = torch.empty(sum(come), dtype=dtype)
            for _ in range(2):
                cpu.run("all_to_all", out, sent[me], 0, "sum", (table[me], come))
                assert torch.equal(out, expected), (kind, dtype)
    cpu.barrier()
    tune(cpu._handle, 64 << 10, 256 << 10, 1)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("world", [2, 3, 4, 5])
def test_all_to_all(world: int, threads: int) -> None:
    pool(world).run(check_all_to_all, threads)


def check_coordinator(rank: Rank) -> None:
    with world_of(rank, "more collectives") as world:
        w, me = world.world_size, world.rank_in_group
        x = torch.arange(6.0).view(3, 2) + 10 * me
        parts = [torch.arange(6.0).view(3, 2) + 10 * r for r in range(w)]
        assert torch.equal(world.all_reduce(x, op="max"), parts[-1])
        assert torch.equal(world.all_reduce(x, op=dist.ReduceOp.AVG), sum(parts) / w)
        y = x.t().clone().t()
        assert world.all_reduce_(y, op="min") is y and torch.equal(y, parts[0])
        found = world.reduce(x, dst=w - 1, op="product")
        assert (found is None) == (me != w - 1)
        assert found is None or torch.equal(found, reference(parts, "product"))
        out = torch.empty(2, 3).t()
        given = [p + 1 for p in parts] if me == 1 else None
        assert world.scatter(out, given, src=1) is out and torch.equal(out, parts[me] + 1)
        whole = torch.arange(2.0 * w).view(2 * w, 1) + 100 * me
        expected = torch.cat([whole[2 * me : 2 * me + 2] - 100 * me + 100 * r for r in range(w)])
        assert torch.equal(world.all_to_all_single(whole), expected)
        come = [r + 1 if me == 0 else 0 for r in range(w)]  # all to rank 0
        ragged = world.all_to_all_single(whole[: me + 1], come, [me + 1] + [0] * (w - 1))
        assert len(ragged) == (sum(range(1, w + 1)) if me == 0 else 0)
        several = world.all_to_all(
            [torch.full((q + 1, 2), 10.0 * me + q) for q in range(w)], [(me + 1, 2)] * w
        )
        for p, got in enumerate(several):
            assert got.shape == (me + 1, 2) and (got == 10 * p + me).all()
        for call, text in (
            (lambda: world.all_reduce(x, op="mean"), "sum, avg, product"),
            (lambda: world.all_reduce(x, op=dist.ReduceOp.PREMUL_SUM), "sum, avg, product"),
            (lambda: world.all_reduce(x, op="bor"), "cannot be reduced by bor"),
            (lambda: world.all_to_all_single(whole[1:]), "input_split_sizes are needed"),
            (lambda: world.all_to_all_single(whole, [1] * (w + 1)), f"{w} sizes >= 0"),
            (lambda: world.all_to_all([x], [(3, 2)]), f"{w} tensors of one dtype"),
            (lambda: world.scatter(x, [x], src=me), "the source"),
        ):
            with pytest.raises(InvalidArgumentError, match=text):
                call()
        assert torch.equal(world.all_reduce(x, op="max"), parts[-1]), "still in step"


@pytest.mark.parametrize("world", [2, 3])
def test_coordinator(world: int) -> None:
    pool(world).run(check_coordinator)


def check_compiled(rank: Rank, backend: str) -> None:
    with world_of(rank, f"compiled {backend}") as world:
        w, me = world.world_size, world.rank_in_group
        given = [torch.ones(4) * p for p in range(w)]

        def step(x: torch.Tensor) -> Any:
            out = torch.empty(4)
            world.scatter(out, given if me == 0 else None, 0)
            return (
                world.all_reduce(x, op="max"),
                world.reduce(x, 0, op="product"),
                world.all_to_all_single(x),
                out,
            )

        x = torch.arange(4.0 * w) + me
        torch._dynamo.reset()
        found = torch.compile(step, backend=backend, fullgraph=True)(x)
        for got, expected in zip(found, step(x), strict=True):
            assert (got is None) == (expected is None)
            assert got is None or torch.equal(got, expected)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_under_torch_compile(backend: str) -> None:
    pool(2).run(check_compiled, backend)


def check_gloo(rank: Rank) -> None:
    with world_of(rank, "over gloo") as world:
        w, me = world.world_size, world.rank_in_group
        gloo = TorchDistributedCommunicator(world.group, torch.device("cpu"))
        assert gloo.refusal is None and gloo.capabilities is not None
        for by in gloo.capabilities.by:
            for dtype in (torch.float32, torch.int32):
                if not reducible(by, dtype):
                    continue
                parts = [torch.arange(1, 7).to(dtype) + r for r in range(w)]
                out = torch.empty_like(parts[0])
                gloo.run("all_reduce", out, parts[me], 0, by)
                assert torch.equal(out, reference(parts, by)), (by, dtype)
                target = out if me == 1 else None
                gloo.run("reduce", target, parts[me], 1, by)
                assert torch.equal(out, reference(parts, by)), (by, dtype)
        whole = torch.arange(2 * w).to(torch.bfloat16)
        out = torch.empty(2, dtype=torch.bfloat16)
        gloo.run("scatter", out, whole if me == 0 else None, 0)
        assert torch.equal(out, whole[2 * me : 2 * me + 2])
        for dtype in (torch.float32, torch.int16):  # int16 goes as bytes
            mine = torch.arange(w).to(dtype) + 10 * me
            out = torch.empty(w, dtype=dtype)
            gloo.run("all_to_all", out, mine, 0, "sum", ([1] * w, [1] * w))
            assert out.tolist() == [10 * p + me for p in range(w)]


def test_the_same_over_gloo() -> None:
    pool(2).run(check_gloo)


# -- when something is wrong ----------------------------------------------------------------------


def disagree(rank: Rank, case: str) -> None:
    cpu = CpuCommunicator(rank.group(timeout_s=30.0), torch.device("cpu"), Settings(timeout_s=30.0))
    odd, x, out = rank.rank == 1, torch.ones(8), torch.empty(8)
    if case == "by":
        cpu.run("all_reduce", x, x, 0, "max" if odd else "min")
    elif case == "splits":
        cpu.run("all_to_all", out, x, 0, "sum", ([3, 5] if odd else [4, 4], [4, 4]))
    elif case == "op":
        cpu.run("all_reduce", x, x) if odd else cpu.run(
            "all_to_all", out, x, 0, "sum", ([4, 4], [4, 4])
        )


@pytest.mark.parametrize(
    ("case", "texts"),
    [
        ("by", ("all_reduce by min of 32 bytes", "all_reduce by max of 32 bytes")),
        ("splits", ("rank 1 sends 12 bytes to rank 0, which expects 16",)),
        ("op", ("all_to_all of float32", "all_reduce of 32 bytes of float32")),
    ],
)
def test_ranks_that_disagree_all_raise(case: str, texts: tuple[str, ...]) -> None:
    for outcome in run_fresh(2, disagree, case):
        assert outcome.error == "CommMismatchError", outcome
        assert all(text in outcome.message for text in texts), outcome.message


def one_missing(rank: Rank, op: str, dies: bool) -> None:
    cpu = CpuCommunicator(rank.group(timeout_s=30.0), torch.device("cpu"), Settings(timeout_s=1.5))
    w, x = rank.world_size, torch.ones(60_000)
    rank.group("before").gather_objects("opened", None)
    if rank.rank == 1:
        if dies:
            signal.raise_signal(signal.SIGKILL)
        time.sleep(4)
        return
    started = time.monotonic()
    splits = [len(x) // w] * w
    try:
        for _ in range(8):
            if op == "all_to_all":
                cpu.run("all_to_all", torch.empty_like(x), x, 0, "sum", (splits, splits))
            else:
                cpu.run("reduce", torch.empty_like(x) if rank.rank == 0 else None, x, 0, "max")
    except CommunicatorError:
        assert time.monotonic() - started < 4
        raise
    # A leaf of a reduce does not wait for its root, until the slots are used up.
    raise CommunicatorError(f"rank {rank.rank} heard of rank 1")


@pytest.mark.parametrize("dies", [False, True])
@pytest.mark.parametrize("op", ["all_to_all", "reduce"])
def test_a_missing_rank_is_named(op: str, dies: bool) -> None:
    expected = "PeerDiedError" if dies else "CommTimeoutError"
    outcome, missing, *_ = run_fresh(2, one_missing, op, dies)
    assert outcome.error == expected and "rank 1" in outcome.message, outcome
    assert missing.killed == dies
