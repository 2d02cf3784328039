"""PyMscclppCommunicator over the real `mscclpp` package, on two GPUs, one process each.

Skipped without the package (docs/mscclpp.md). No NVLink multicast: the candidates are the packet
algorithms and rsag, and a package that was built without multicast is enough.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from communicators.backends.mscclpp.context import ALGORITHMS
from communicators.backends.mscclpp.pymscclpp import PyMscclppCommunicator, mscclpp_bench_time
from communicators.errors import RefusedError
from communicators.functional import mscclpp as functions
from communicators.selection.dispatcher import Dispatcher
from tests.ranks import Rank, Ranks

pytestmark = pytest.mark.multigpu

if not torch.cuda.is_available() or torch.cuda.device_count() < 2:
    pytest.skip("fewer than two CUDA GPUs", allow_module_level=True)
if importlib.util.find_spec("mscclpp") is None:
    pytest.skip("the package mscclpp is not installed", allow_module_level=True)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST = 16 << 20
SIZES = (16, 48, 1 << 10, 2000, 4 << 10, 64 << 10, (64 << 10) + 16, 1 << 20, LARGEST)
SUMS = ("allpair_packet", "packet", "rsag")


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    made = Ranks(2, gpus=True)
    made.run(_open, deadline_s=120)
    yield made
    made.run(_close)
    made.kill()


def _open(me: Rank) -> None:
    comm = PyMscclppCommunicator(me.world, me.device, LARGEST)
    assert comm.refusal is None, comm.refusal
    assert comm.context is not None
    assert set(comm.context.algorithms) == {*SUMS, "fullmesh"}
    assert not any("nvls" in algorithm.name for algorithm in comm.context.algorithms.values())
    me.cache["comm"] = comm


def _close(me: Rank) -> None:
    comm = me.cache.pop("comm")
    comm.close()
    comm.close()
    with pytest.raises(RefusedError, match="closed"):
        comm.all_reduce(torch.ones(8, device=me.device))


def both(me: Rank, nbytes: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """What the two ranks contribute: whole numbers, whose sums are exact in every dtype."""
    generator = torch.Generator(me.device).manual_seed(seed)
    count = nbytes // dtype.itemsize
    return [
        torch.randint(-60, 60, (count,), device=me.device, generator=generator).to(dtype)
        for _ in range(2)
    ]


def _tuned(me: Rank) -> list[tuple[int, tuple[str, int, int]]]:
    comm = me.cache["comm"]
    for dtype in (torch.float16, torch.float32):
        assert comm.pre_tune_config(dtype)
    sizes = [1 << shift for shift in range(10, 25)]
    for dtype in DTYPES:
        rows = comm.tuned[dtype]
        assert [size for size, _ in rows] == sizes
        assert all(name in SUMS for _, (name, _, _) in rows)
    return comm.tuned


def test_tuning_agrees_on_all_ranks(ranks: Ranks) -> None:
    first, second = ranks.run(_tuned, deadline_s=180)
    assert first == second


def _sums(me: Rank, dtype: torch.dtype) -> None:
    comm = me.cache["comm"]
    for seed, nbytes in enumerate(SIZES):
        inputs = both(me, nbytes, dtype, seed)
        expected = inputs[0] + inputs[1]
        mine = inputs[me.rank].clone()
        for _ in range(5):
            assert torch.equal(comm.all_reduce(mine), expected), nbytes
        assert torch.equal(mine, inputs[me.rank])
        noise = [torch.randn(expected.numel(), device=me.device).to(dtype) for _ in range(2)]
        everyones = torch.empty(2 * expected.numel(), device=me.device, dtype=dtype)
        comm.run("all_gather", everyones, noise[me.rank])
        a, b = everyones.chunk(2)
        assert torch.equal((a, b)[me.rank], noise[me.rank]), "all_gather keeps every bit"
        exact = a.double() + b.double()
        error = (comm.all_reduce(noise[me.rank]).double() - exact).abs()
        step = torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).tiny
        assert (error <= step).all(), f"{nbytes}: more than one rounding"
    base = torch.ones(257, device=me.device, dtype=dtype)
    shifted = base[1:] if me.rank == 0 else base[:-1]  # off 16 bytes, on one rank only
    assert torch.equal(comm.all_reduce(shifted), shifted * 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_sums_and_gathers(ranks: Ranks, dtype: torch.dtype) -> None:
    ranks.run(_sums, dtype, deadline_s=120)


def _limits(me: Rank, name: str) -> None:
    """Every launch that may be tried, at the smallest sizes and at the largest one it takes."""
    context = me.cache["comm"].context
    largest = LARGEST
    while context.why_not(name, largest) is not None:
        largest -= 16
    for nbytes in (16, 4 << 10, largest):
        if context.why_not(name, nbytes) is not None:
            continue
        inputs = both(me, nbytes, torch.bfloat16, nbytes)
        out = torch.empty_like(inputs[0])
        for blocks, threads in ((0, 0), *ALGORITHMS[name].launches(2)):
            for _ in range(3):
                out.fill_(-1)
                context.execute(name, inputs[me.rank], out, blocks, threads)
                assert torch.equal(out, inputs[0] + inputs[1]), (nbytes, blocks, threads)


@pytest.mark.parametrize("name", SUMS)
def test_each_algorithm_up_to_its_limit(ranks: Ranks, name: str) -> None:
    ranks.run(_limits, name, deadline_s=120)


def _graph(me: Rank, nbytes: int) -> None:
    comm = me.cache["comm"]
    static = torch.zeros(nbytes // 2, device=me.device, dtype=torch.bfloat16)
    comm.all_reduce(static)
    torch.cuda.synchronize()
    me.world.barrier()
    graph = torch.cuda.CUDAGraph()
    with comm.capture(), torch.cuda.graph(graph):
        first = comm.all_reduce(static)
        second = comm.all_reduce(first)
    for turn in range(6):
        inputs = both(me, nbytes, torch.bfloat16, turn)
        static.copy_(inputs[me.rank])
        eager = comm.all_reduce(static) if turn % 2 else None
        graph.replay()
        torch.cuda.synchronize()
        total = inputs[0] + inputs[1]
        assert torch.equal(first, total) and torch.equal(second, 2 * total), turn
        assert eager is None or torch.equal(eager, total)


@pytest.mark.parametrize("nbytes", [1 << 10, 64 << 10, 4 << 20])
def test_graphs_replay_between_eager_calls(ranks: Ranks, nbytes: int) -> None:
    ranks.run(_graph, nbytes, deadline_s=120)


def _two(me: Rank) -> None:
    """A second communicator counts its own calls; in a dispatcher it is what runs."""
    other = PyMscclppCommunicator(me.world, me.device, "64KB")
    assert other.refusal is None, other.refusal
    comm = me.cache["comm"]
    inputs = both(me, 4 << 10, torch.float16)
    total = inputs[0] + inputs[1]
    for turn in range(20):
        for one in (comm, other)[: 1 + (turn % 3 > 0)]:
            assert torch.equal(one.all_reduce(inputs[me.rank]), total)
    dispatcher = Dispatcher(me.world, me.device, [other])
    x = inputs[me.rank].clone()
    dispatcher.run("all_reduce", x, x)
    assert torch.equal(x, total)
    assert "up to 64 KB: mscclpp" in dispatcher.explain()
    other.close()
    assert torch.equal(comm.all_reduce(inputs[me.rank]), total)


def test_two_communicators(ranks: Ranks) -> None:
    ranks.run(_two, deadline_s=120)


def _functions(me: Rank) -> None:
    made = functions.mscclpp_generate_unique_id() if me.rank == 0 else None
    identity = me.world.gather_objects("mscclpp id", made)[0]
    scratch = torch.zeros(12 << 20, dtype=torch.uint8, device=me.device)
    for selection in (1, 2):
        if selection == 2:
            made = functions.mscclpp_generate_unique_id() if me.rank == 0 else None
            identity = me.world.gather_objects("mscclpp id", made)[0]
        handle = functions.mscclpp_init_context(
            identity, me.rank, 2, scratch, torch.empty(0, device=me.device), 2, [0, 0], [0, 1],
            selection,
        )  # fmt: skip
        for nbytes in (1 << 10, 1 << 20):
            inputs = both(me, nbytes, torch.float16, selection)
            out = torch.empty_like(inputs[0])
            functions.mscclpp_allreduce(handle, inputs[me.rank], out, 0, 0)
            assert torch.equal(out, inputs[0] + inputs[1])
        torch.cuda.synchronize()
        me.world.barrier()


def test_the_functions_of_the_kernel_library(ranks: Ranks) -> None:
    ranks.run(_functions, deadline_s=120)


def _times(me: Rank) -> list[tuple[int, str, float]]:
    comm, found = me.cache["comm"], []
    for shift in (10, 14, 17, 20, 24):
        x = both(me, 1 << shift, torch.bfloat16)[0]
        name = comm._config(torch.bfloat16, 1 << shift)[0]
        us = mscclpp_bench_time(lambda: comm.all_reduce(x), 20)  # noqa: B023
        found.append((1 << shift, name, us))
    return found


def test_it_is_timed(ranks: Ranks) -> None:
    for row in ranks.run(_times, deadline_s=120)[0]:
        print(f"mscclpp all_reduce of {row[0]} bytes by {row[1]}: {row[2]:.1f} us")
        assert row[2] > 0
