"""CustomAllreduce on two GPUs, one process each: results, graphs and bad input."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from communicators.backends.custom_all_reduce import CustomAllreduce
from communicators.errors import InvalidArgumentError, RefusedError
from tests.gpu.virtual_ranks import rank_ordered_sum, same_bits
from tests.ranks import Rank, Ranks

# A mark and not a skip of the module, which ranks that see one GPU import too.
pytestmark = [
    pytest.mark.multigpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA GPUs"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = (1, 8, 333, 4096, 65536, 262145, 1 << 20, (3 << 20) + 5, 12 << 20)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    made = Ranks(2, gpus=True)
    made.run(_open, deadline_s=120)
    yield made
    made.run(_close)
    made.kill()


def _open(me: Rank) -> None:
    me.cache["comm"] = CustomAllreduce(me.world, me.device)
    assert not me.cache["comm"].disabled, me.cache["comm"].refusal
    me.cache["comm"].set_timeout(10)


def _close(me: Rank) -> None:
    comm = me.cache.pop("comm")
    comm.close()
    comm.close()
    with pytest.raises(RefusedError, match="was closed"):
        comm.all_reduce(torch.ones(4, device=me.device))


def _inputs(me: Rank, count: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """Every rank's input, the same on all ranks."""
    made = []
    for rank in range(me.world_size):
        generator = torch.Generator(me.device).manual_seed(seed * 100 + rank)
        made.append(torch.randn(count, generator=generator, device=me.device).to(dtype))
    return made


def _sums(me: Rank, algorithm: int) -> None:
    comm = me.cache["comm"]
    comm.tune("algorithm", algorithm)
    for number, count in enumerate(SIZES):
        for dtype in DTYPES:
            inputs = _inputs(me, count, dtype, number)
            expected = rank_ordered_sum(inputs)
            mine = inputs[me.rank]
            before = mine.clone()
            for _ in range(3):
                out = torch.full_like(mine, float("nan"))
                comm.all_reduce(mine, out=out)
                comm.synchronize()
                assert torch.equal(out, expected), (count, dtype)
            assert torch.equal(mine, before)
            assert comm.all_reduce(mine, out=mine) is mine
            comm.synchronize()
            assert torch.equal(mine, expected), (count, dtype, "in place")
    comm.tune("algorithm", 0)


@pytest.mark.parametrize("algorithm", range(4))
def test_sums(ranks: Ranks, algorithm: int) -> None:
    ranks.run(_sums, algorithm, deadline_s=120)


def _special(me: Rank, algorithm: int) -> None:
    comm = me.cache["comm"]
    comm.tune("algorithm", algorithm)
    for dtype in DTYPES:
        integers = torch.int32 if dtype == torch.float32 else torch.int16
        generator = torch.Generator(me.device).manual_seed(5)
        bits = torch.randint(-(2**31), 2**31 - 1, (me.world_size, 1 << 20), generator=generator,
                             device=me.device).to(integers)  # fmt: skip
        bits[:, ::7] = -1
        inputs = list(bits.view(dtype))
        out = comm.all_reduce(inputs[me.rank])
        comm.synchronize()
        assert same_bits(out, rank_ordered_sum(inputs)), dtype
        checksum = out.view(integers).long().sum().item()
        assert len(set(me.world.gather_objects("bits", checksum))) == 1
    comm.tune("algorithm", 0)


@pytest.mark.parametrize("algorithm", range(4))
def test_every_bit_pattern(ranks: Ranks, algorithm: int) -> None:
    ranks.run(_special, algorithm)


def _gather_and_scatter(me: Rank) -> None:
    comm = me.cache["comm"]
    for number, count in enumerate(SIZES):
        inputs = _inputs(me, count * me.world_size, torch.bfloat16, number)
        got = comm.reduce_scatter(inputs[me.rank])
        gathered = comm.all_gather(inputs[me.rank])
        comm.synchronize()
        part = rank_ordered_sum(inputs).view(me.world_size, -1)[me.rank]
        assert torch.equal(got, part), count
        assert torch.equal(gathered, torch.cat(inputs)), count


def test_gather_and_scatter(ranks: Ranks) -> None:
    ranks.run(_gather_and_scatter)


def _graph(me: Rank, algorithm: int, count: int) -> None:
    comm = me.cache["comm"]
    comm.tune("algorithm", algorithm)
    x = torch.zeros(count, device=me.device, dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    comm.all_reduce(x)
    with comm.capture(), torch.cuda.graph(graph):
        first = comm.all_reduce(x)
        second = comm.all_reduce(first * 0.5)
    for turn in range(5):
        inputs = _inputs(me, count, torch.bfloat16, turn)
        x.copy_(inputs[me.rank])
        if turn % 2:
            eager = comm.all_reduce(x)
        graph.replay()
        comm.synchronize()
        expected = rank_ordered_sum(inputs)
        assert torch.equal(first, expected), turn
        assert torch.equal(second, rank_ordered_sum([expected * 0.5] * me.world_size)), turn
        if turn % 2:
            assert torch.equal(eager, expected)
    comm.tune("algorithm", 0)


@pytest.mark.parametrize("algorithm", range(4))
@pytest.mark.parametrize("count", (512, 100_000, 9 << 20))
def test_graph_replays_between_eager_calls(ranks: Ranks, algorithm: int, count: int) -> None:
    ranks.run(_graph, algorithm, count)


def _skewed(me: Rank) -> None:
    """Ranks drift apart by a few hundred calls and by milliseconds of other work."""
    comm = me.cache["comm"]
    inputs = _inputs(me, 20_000, torch.bfloat16, 9)
    expected = rank_ordered_sum(inputs)
    outputs = []
    for turn in range(300):
        if turn % 50 == me.rank * 25:
            torch.cuda._sleep(2_000_000)
        outputs.append(comm.all_reduce(inputs[me.rank]))
    comm.synchronize()
    assert all(torch.equal(out, expected) for out in outputs)


def test_skewed_ranks(ranks: Ranks) -> None:
    ranks.run(_skewed)


def _bad_input(me: Rank) -> None:
    comm = me.cache["comm"]
    x = torch.ones(64, device=me.device)
    with pytest.raises(InvalidArgumentError, match="it sums bfloat16, float16, float32"):
        comm.all_reduce(x.long())
    with pytest.raises(InvalidArgumentError, match="is bound to cuda"):
        comm.all_reduce(torch.ones(64))
    with pytest.raises(InvalidArgumentError, match="is bound to cuda"):
        comm.all_reduce(torch.ones(64, device=f"cuda:{1 - me.device.index}"))
    with pytest.raises(InvalidArgumentError, match="64 elements and the output 32"):
        comm.all_reduce(x, out=x[:32].clone())
    with pytest.raises(InvalidArgumentError, match="must be contiguous"):
        comm.run("all_reduce", x, torch.ones(128, device=me.device)[::2])
    assert not comm.should_custom_ar(x.long())
    assert comm.custom_all_reduce(x.long()) is None
    assert comm.all_reduce(x[:0]).numel() == 0
    strided = torch.arange(128.0, device=me.device)[::2]
    unaligned = torch.arange(65.0, device=me.device)[1:]
    assert torch.equal(comm.all_reduce(strided), strided * 2)
    assert torch.equal(comm.all_reduce(unaligned), unaligned * 2)
    comm.synchronize()


def test_bad_input(ranks: Ranks) -> None:
    ranks.run(_bad_input)


def _compiled(me: Rank) -> None:
    comm = me.cache["comm"]

    def layer(x: torch.Tensor) -> torch.Tensor:
        return comm.all_reduce(x * 2) + 1

    x = torch.arange(4096.0, device=me.device)
    compiled = torch.compile(layer, fullgraph=True)
    assert torch.equal(compiled(x), x * 4 + 1)
    out = torch.empty_like(x)
    arguments = (comm._handle, x, out)
    torch.library.opcheck(
        torch.ops.communicators.custom_ar_all_reduce.default, arguments,
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_compile(ranks: Ranks) -> None:
    ranks.run(_compiled, deadline_s=120)


def _expandable(me: Rank) -> None:
    comm = me.cache["comm"]
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    try:
        pool = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(pool):
            inputs = _inputs(me, 1 << 20, torch.bfloat16, 77)
        assert torch.equal(comm.all_reduce(inputs[me.rank]), rank_ordered_sum(inputs))
    finally:
        torch.cuda.memory._set_allocator_settings("expandable_segments:False")


def test_expandable_segments_need_nothing(ranks: Ranks) -> None:
    ranks.run(_expandable)


def _freed_input(me: Rank) -> None:
    """The memory of a captured input goes back to the allocator; somebody else writes there."""
    comm = me.cache["comm"]
    x = torch.zeros(1 << 20, device=me.device)
    graph = torch.cuda.CUDAGraph()
    with comm.capture(), torch.cuda.graph(graph):
        out = comm.all_reduce(x)
    address = x.data_ptr()
    del x
    y = torch.full((1 << 20,), me.rank + 1.0, device=me.device)
    graph.replay()
    comm.synchronize()  # the replay ended, on every rank, and reports nothing
    if me.world.gather_objects("reused", y.data_ptr() == address) == [True] * me.world_size:
        assert (out == sum(range(1, me.world_size + 1))).all()  # it summed what now lies there
    assert torch.equal(comm.all_reduce(torch.ones(8, device=me.device)).cpu(),
                       torch.full((8,), float(me.world_size)))  # fmt: skip


def test_a_freed_captured_input_hangs_nobody(ranks: Ranks) -> None:
    ranks.run(_freed_input)
