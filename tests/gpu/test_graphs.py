"""CUDA graphs of the exact and the quantized all-reduce, with virtual ranks on one GPU.

The driver destroys what a graph retains on a thread of its own, so "gone" is waited for.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from communicators.bindings.collectives import DTYPES, Collectives
from communicators.errors import CommTimeoutError
from tests.gpu.test_quick_all_reduce import QuickRanks
from tests.gpu.virtual_ranks import VirtualRanks, rank_ordered_sum

pytestmark = pytest.mark.gpu

if not torch.cuda.is_available():
    pytest.skip("no CUDA GPU", allow_module_level=True)

WORLD = 2


def until(true: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    return true()


def graphs_of(ranks: Any) -> list[int]:
    return [ranks.library.graphs(handle) for handle in ranks.handles]


class Captured:
    """A graph of all-reduces of all ranks, by plain torch.cuda.graph."""

    def __init__(self, ranks: VirtualRanks, count: int, calls: int = 1) -> None:
        self.inputs = [torch.zeros(count, device="cuda") for _ in ranks.handles]
        self.outputs = [torch.full((count,), -1.0, device="cuda") for _ in ranks.handles]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for _ in range(calls):
                ranks.all_reduce(self.inputs, self.outputs)

    def check_replay(self, ranks: VirtualRanks) -> None:
        for x in self.inputs:
            x.normal_()
        self.graph.replay()
        ranks.check()
        expected = rank_ordered_sum(self.inputs)
        assert all(torch.equal(out, expected) for out in self.outputs)


@pytest.fixture
def ranks() -> Iterator[VirtualRanks]:
    with VirtualRanks(WORLD) as made:
        yield made


def test_a_captured_call_is_noted_without_a_scope(ranks: VirtualRanks) -> None:
    assert graphs_of(ranks) == [0, 0]
    captured = Captured(ranks, 4096, calls=3)
    assert graphs_of(ranks) == [1, 1]
    found = [ranks.library.captured(handle) for handle in ranks.handles]
    assert found[0] == found[1] and found[0][0] == 3
    captured.check_replay(ranks)
    x = [torch.ones(64, device="cuda") for _ in ranks.handles]
    ranks.all_reduce(x, x)
    ranks.check()
    assert graphs_of(ranks) == [1, 1] and ranks.library.captured(ranks.handles[0]) == (0, 0)
    del captured
    assert until(lambda: graphs_of(ranks) == [0, 0])


def test_the_operator_notes_it_too(ranks: VirtualRanks) -> None:
    x = [torch.ones(64, device="cuda") for _ in ranks.handles]
    out = [torch.empty_like(each) for each in x]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        current = torch.cuda.current_stream()
        for rank, stream in enumerate(ranks.streams):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                torch.ops.communicators.custom_ar_all_reduce(
                    ranks.handles[rank], x[rank], out[rank]
                )
        for stream in ranks.streams:
            current.wait_stream(stream)
    assert graphs_of(ranks) == [1, 1]
    graph.replay()
    ranks.check()
    assert all((each == WORLD).all() for each in out)


def test_gathers_and_reduce_scatters_are_noted(ranks: VirtualRanks) -> None:
    whole = [torch.ones(64 * WORLD, device="cuda") for _ in ranks.handles]
    part = [torch.ones(64, device="cuda") for _ in ranks.handles]
    graphs = []
    for call in (
        lambda: ranks.all_gather(part, whole),
        lambda: ranks.reduce_scatter(whole, part),
    ):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            call()
    assert graphs_of(ranks) == [2, 2]
    for graph in graphs:
        graph.replay()
    ranks.check()
    assert all((each == WORLD).all() for each in part)


def test_many_graphs_in_any_order_of_replay_and_destruction(ranks: VirtualRanks) -> None:
    order, alive = random.Random(3), []
    for turn in range(40):
        kind = order.random()
        if not alive or (kind < 0.3 and len(alive) < 6):
            alive.append(Captured(ranks, order.choice((8, 1000, 200_000)), order.choice((1, 4))))
        elif kind < 0.4:
            alive.pop(order.randrange(len(alive)))
        else:
            order.choice(alive).check_replay(ranks)
        if turn % 7 == 0:
            x = [torch.ones(99, device="cuda") for _ in ranks.handles]
            ranks.all_reduce(x, x)
            ranks.check()
            assert all((each == WORLD).all() for each in x)
    count = len(alive)
    assert until(lambda: graphs_of(ranks) == [count] * WORLD)


def test_pieces_of_a_step_share_a_pool(ranks: VirtualRanks) -> None:
    """As engines capture them: graphs in one memory pool, with eager work between their replays."""
    x = [torch.zeros(1000, device="cuda") for _ in ranks.handles]
    pool, pieces = torch.cuda.graph_pool_handle(), []
    for _ in range(5):
        pieces.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(pieces[-1], pool=pool):
            ranks.all_reduce(x, x)
    for _ in range(3):
        for each in x:
            each.fill_(1)
        for number, piece in enumerate(pieces, 1):
            piece.replay()
            ranks.check()
            assert all((each == WORLD**number).all() for each in x)


def end(library: Collectives, handles: list[int], freed: list[int]) -> None:
    for rank, handle in enumerate(handles):
        library.end(handle, torch.device("cuda"), functools.partial(freed.append, rank))


def test_what_a_graph_reads_outlives_the_end() -> None:
    ranks, freed = VirtualRanks(WORLD), []
    graphs = [Captured(ranks, 5000), Captured(ranks, 64)]
    graphs[0].check_replay(ranks)
    end(ranks.library, ranks.handles, freed)
    for captured in graphs:
        for out in captured.outputs:
            out.fill_(-7)
        captured.graph.replay()
        torch.cuda.synchronize()
        assert all((out == -7).all() for out in captured.outputs), "it ends at once"
    del captured, graphs[0]
    torch.cuda.synchronize()
    time.sleep(0.2)
    ranks.library.reclaim()
    assert freed == [], "the other graph may still be replayed"
    graphs.clear()
    handles = set(ranks.handles)

    def reclaimed() -> bool:
        ranks.library.reclaim()
        return handles.isdisjoint(ranks.library._retired)

    assert until(reclaimed)
    assert sorted(freed) == [0, 1]
    for buffer in ranks.buffers:
        buffer.close()
    assert torch.ones(8, device="cuda").sum().item() == 8


def test_quantized_calls_are_noted_and_outlive_the_end() -> None:
    ranks, freed = QuickRanks(WORLD), []
    x = [torch.ones(4096, dtype=torch.bfloat16, device="cuda") for _ in range(WORLD)]
    out = [torch.zeros_like(each) for each in x]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ranks.all_reduce(x, out, "FP")
    assert graphs_of(ranks) == [1, 1]
    graph.replay()
    ranks.check()
    assert all((each == WORLD).all() for each in out)
    end(ranks.library, ranks.handles, freed)
    for each in out:
        each.fill_(-7)
    graph.replay()
    torch.cuda.synchronize()
    assert all((each == -7).all() for each in out) and freed == []
    del graph

    def reclaimed() -> bool:
        ranks.library.reclaim()
        return sorted(freed) == [0, 1]

    assert until(reclaimed)
    for buffer in ranks.buffers:
        buffer.close()


def test_a_graph_that_one_rank_replays_alone_meets_the_deadline() -> None:
    with VirtualRanks(WORLD, timeout_s=0.3) as ranks:
        x = torch.ones(64, device="cuda")
        both = [torch.ones(64, device="cuda") for _ in ranks.handles]
        ranks.all_reduce(both, both)  # they have met
        ranks.check()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            stream = torch.cuda.current_stream().cuda_stream
            at = (x.data_ptr(), x.data_ptr(), x.nbytes)
            ranks.library.check(
                ranks.library.custom_ar_all_reduce(ranks.handles[0], DTYPES[x.dtype], *at, stream)
            )
        assert graphs_of(ranks) == [1, 0]
        graph.replay()
        with pytest.raises(CommTimeoutError, match="for rank 1"):
            ranks.check()
        del graph
