"""QuickAllReduce on two GPUs, one process each: bits, graphs, the dispatcher, bad input, faults."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch

from communicators.backends.quick import codecs as quick_codecs
from communicators.backends.quick.quick_all_reduce import QuickAllReduce
from communicators.errors import CommTimeoutError, InvalidArgumentError, RefusedError
from tests.gpu.test_quick_all_reduce import random_inputs, same
from tests.ranks import Rank, Ranks

pytestmark = pytest.mark.multigpu

if not torch.cuda.is_available() or torch.cuda.device_count() < 2:
    pytest.skip("fewer than two CUDA GPUs", allow_module_level=True)

CODECS = ("FP", "Q8", "Q6", "Q4")
SIZES = (1, 333, 65_536, (1 << 20) + 5, 3 << 20)
#: More than an area holds, so that one call is several launches, of many turns of their loops.
LONG = 70_000_000


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    made = Ranks(2, gpus=True)
    made.run(_open, deadline_s=120)
    yield made
    made.run(_close)
    made.kill()


def _open(me: Rank) -> None:
    for codec in CODECS:
        me.cache[codec] = QuickAllReduce(me.world, me.device, codec, least_bytes=0)
        assert me.cache[codec].refusal is None, me.cache[codec].refusal
        me.cache[codec].set_timeout(10)


def _close(me: Rank) -> None:
    for codec in CODECS:
        comm = me.cache.pop(codec)
        comm.close()
        comm.close()
        with pytest.raises(RefusedError, match="was closed"):
            comm.quick_all_reduce(torch.ones(4, device=me.device, dtype=torch.half))


def _sums(me: Rank, codec: str) -> None:
    comm = me.cache[codec]
    for seed, count in enumerate(SIZES):
        for dtype in (torch.float16, torch.bfloat16):
            inputs = random_inputs(2, count, dtype, seed)
            expected = quick_codecs.all_reduce(inputs, codec)
            mine = inputs[me.rank].clone()
            for _ in range(5):
                out = comm.quick_all_reduce(mine)
                torch.cuda.synchronize()
                comm.check()
                assert same(out, expected), (count, dtype)
            assert same(mine, inputs[me.rank])
            assert comm.quick_all_reduce(mine, out=mine) is mine
            torch.cuda.synchronize()
            assert same(mine, expected), (count, dtype, "in place")


@pytest.mark.parametrize("codec", CODECS)
def test_the_bits_of_the_model(ranks: Ranks, codec: str) -> None:
    ranks.run(_sums, codec, deadline_s=120)


def _large(me: Rank, codec: str) -> None:
    inputs = random_inputs(2, LONG, torch.bfloat16, 5)
    out = me.cache[codec].quick_all_reduce(inputs[me.rank])
    torch.cuda.synchronize()
    me.cache[codec].check()
    assert same(out, quick_codecs.all_reduce(inputs, codec))


@pytest.mark.parametrize("codec", CODECS)
def test_long_messages(ranks: Ranks, codec: str) -> None:
    ranks.run(_large, codec, deadline_s=120)


def _graph(me: Rank, codec: str) -> None:
    comm, count = me.cache[codec], 300_000
    static = torch.zeros(count, device=me.device, dtype=torch.bfloat16)
    comm.quick_all_reduce(static)
    graph = torch.cuda.CUDAGraph()
    with comm.capture(), torch.cuda.graph(graph):
        first = comm.quick_all_reduce(static)
        second = comm.quick_all_reduce(first)
    for turn in range(6):
        inputs = random_inputs(2, count, torch.bfloat16, turn)
        static.copy_(inputs[me.rank])
        eager = comm.quick_all_reduce(static) if turn % 2 else None
        graph.replay()
        torch.cuda.synchronize()
        comm.check()
        expected = quick_codecs.all_reduce(inputs, codec)
        assert same(first, expected), turn
        assert same(second, quick_codecs.all_reduce([expected] * 2, codec)), turn
        assert eager is None or same(eager, expected)


@pytest.mark.parametrize("codec", CODECS)
def test_graph_replays_between_eager_calls(ranks: Ranks, codec: str) -> None:
    ranks.run(_graph, codec, deadline_s=120)


def _skewed(me: Rank) -> None:
    comm = me.cache["Q8"]
    inputs = random_inputs(2, 40_000, torch.bfloat16, 9)
    expected = quick_codecs.all_reduce(inputs, "Q8")
    mine = inputs[me.rank]
    outputs = []
    for turn in range(300):
        if turn % 50 == me.rank * 25:
            torch.cuda._sleep(2_000_000)
        outputs.append(comm.quick_all_reduce(mine))
    torch.cuda.synchronize()
    comm.check()
    assert all(same(out, expected) for out in outputs)


def test_skewed_ranks(ranks: Ranks) -> None:
    ranks.run(_skewed)


def _compiled(me: Rank, codec: str, backend: str) -> None:
    comm = me.cache[codec]

    def layer(x: torch.Tensor) -> torch.Tensor:
        return comm.quick_all_reduce(x * 2) + 1

    inputs = random_inputs(2, 70_000, torch.bfloat16, 3)
    expected = quick_codecs.all_reduce([x * 2 for x in inputs], codec) + 1
    mine = inputs[me.rank]
    torch.compiler.reset()  # one graph a codec
    assert same(torch.compile(layer, fullgraph=True, backend=backend)(mine), expected)
    out = torch.empty_like(mine)
    arguments = (comm._handle, mine, out, CODECS.index(codec))
    torch.library.opcheck(
        torch.ops.communicators.quick_all_reduce.default, arguments,
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="must have the same dtype and size"):
        torch.ops.communicators.quick_all_reduce(comm._handle, mine, out[1:], 1)


@pytest.mark.parametrize("codec", CODECS)
def test_compile(ranks: Ranks, codec: str) -> None:
    # What the compiler makes of it does not depend on the codec, and takes it many seconds.
    ranks.run(_compiled, codec, "inductor" if codec == "Q8" else "aot_eager", deadline_s=120)


def _bad_input(me: Rank) -> None:
    comm = me.cache["Q8"]
    x = torch.ones(64, device=me.device, dtype=torch.half)
    with pytest.raises(InvalidArgumentError, match="float16 or bfloat16 is accepted"):
        comm.quick_all_reduce(x.float())
    with pytest.raises(InvalidArgumentError, match="is bound to cuda"):
        comm.quick_all_reduce(x.cpu())
    assert not comm.should_quick_allreduce(x.float()) and comm.should_quick_allreduce(x)
    assert comm.quick_all_reduce(x[:0]).numel() == 0
    strided = torch.ones(128, device=me.device, dtype=torch.half)[::2]
    assert torch.equal(comm.quick_all_reduce(strided), strided * 2)
    refused = QuickAllReduce(me.world, me.device)
    assert "no codec was allowed" in str(refused.refusal)
    differing = QuickAllReduce(me.world, me.device, "Q8" if me.rank else "Q4", least_bytes=0)
    assert "has codec" in str(differing.refusal)
    comm.close()
    assert not comm.should_quick_allreduce(x)
    comm.init_quick_all_reduce()
    assert torch.equal(comm.quick_all_reduce(x), x * 2)


def test_bad_input_and_refusals(ranks: Ranks) -> None:
    ranks.run(_bad_input)


def _survive(me: Rank) -> float:
    comm = QuickAllReduce(me.world, me.device, "Q4", least_bytes=0)
    comm.set_timeout(2)
    x = torch.ones(1 << 20, device=me.device, dtype=torch.half)
    comm.quick_all_reduce(x)
    torch.cuda.synchronize()
    me.world.barrier()
    if me.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    comm.quick_all_reduce(x)
    torch.cuda.synchronize()
    with pytest.raises(CommTimeoutError, match=r"on rank 0 of 2 waited .* for rank 1"):
        comm.check()
    comm.close()
    return time.monotonic() - started


def test_a_killed_rank_is_named_within_the_deadline() -> None:
    ranks = Ranks(2, gpus=True)
    answers = ranks.outcomes(_survive, deadline_s=60)
    ranks.kill()
    assert not answers[0].error, answers[0].trace
    assert answers[0].value < 15
    assert answers[1].killed
