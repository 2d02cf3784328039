"""The decode step as a CUDA graph, with a stand-in for the graph that runs without a GPU.

The stand-in does what a graph does: nothing at capture but remember the tensors, and at replay the
same work on what those tensors hold by then. tests/gpu has the real one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from communicators import parallel_state
from scripts.tp_llama.errors import JobError
from scripts.tp_llama.generate import Generation, Generator, Limits
from scripts.tp_llama.kv_cache import PagedKVCache
from scripts.tp_llama.loader import load
from scripts.tp_llama.model import DecodeInputs, LlamaModel
from scripts.tp_llama.timed_group import TimedGroup
from tests.unit.tp_llama.thread_ranks import ThreadGroup, on_ranks
from tests.unit.tp_llama.tiny_checkpoint import write_checkpoint

PROMPTS = [[256, 5, 17, 200], list(range(30, 70)), [256, 9, 9]]


class StandIn:
    """What the fake graphs of this thread (a rank) have seen."""

    def __init__(self) -> None:
        self.in_scope = self.recording = False
        self.warm_up_runs = self.captures = self.replays = self.resets = 0


class FakeGraph:
    def __init__(self) -> None:
        self.recorded: list[tuple[LlamaModel, DecodeInputs, PagedKVCache, Tensor]] = []

    def replay(self) -> None:
        here().replays += 1
        for model, inputs, cache, logits in self.recorded:
            logits.copy_(run_decode(model, inputs, cache))

    def reset(self) -> None:
        here().resets += 1
        self.recorded.clear()


run_decode = LlamaModel.decode
ranks = threading.local()


def here() -> StandIn:
    if not hasattr(ranks, "seen"):
        ranks.seen = StandIn()
    return ranks.seen


@pytest.fixture
def fake_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def graph_capture() -> Iterator[SimpleNamespace]:
        here().in_scope = True
        yield SimpleNamespace(stream="the side stream")
        here().in_scope = False

    @contextmanager
    def record(graph: FakeGraph, stream: str, capture_error_mode: str) -> Iterator[None]:
        assert here().in_scope and stream == "the side stream"
        assert capture_error_mode == "thread_local"
        here().recording, here().captures = True, here().captures + 1
        ranks.graph = graph
        yield
        here().recording = False

    def decode(model: LlamaModel, inputs: DecodeInputs, cache: PagedKVCache) -> Tensor:
        logits = run_decode(model, inputs, cache)
        if here().recording:
            ranks.graph.recorded.append((model, inputs, cache, logits))
            logits.fill_(torch.nan)  # nothing has run yet
        elif here().in_scope:
            here().warm_up_runs += 1
        return logits

    monkeypatch.setattr(LlamaModel, "decode", decode)
    monkeypatch.setattr(parallel_state, "graph_capture", graph_capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)


def generate(group: ThreadGroup, directory: Path, graph: bool, limits: Limits) -> Generation:
    tp = TimedGroup(group)
    config, part, weights = load(directory, tp)
    generator = Generator(LlamaModel(config, part, weights, tp, 128), torch.float32)
    assert not generator.graph  # it is for GPUs
    generator.graph = graph
    return generator(PROMPTS, limits)


@pytest.mark.usefixtures("fake_graphs")
@pytest.mark.parametrize("world_size", [1, 2])
def test_replays_give_the_tokens_of_the_step_itself(tmp_path: Path, world_size: int) -> None:
    write_checkpoint(tmp_path)
    eager = on_ranks(world_size, lambda g: generate(g, tmp_path, False, Limits(24)))[0]
    # One sequence ends early and is left out of the replays after that.
    limits = Limits(24, (eager.tokens[0][6],))
    eager = on_ranks(world_size, lambda g: generate(g, tmp_path, False, limits))[0]

    def work(group: ThreadGroup) -> tuple[Generation, StandIn]:
        return generate(group, tmp_path, True, limits), here()

    for generated, seen in on_ranks(world_size, work):
        assert generated.tokens == eager.tokens
        assert (seen.warm_up_runs, seen.captures, seen.replays, seen.resets) == (2, 1, 23, 1)
        assert generated.capture_seconds is not None
        assert "outside the CUDA graph (inside it is not timed)" in generated.decode.summary()
        assert "CUDA" not in generated.prefill.summary()


@pytest.mark.usefixtures("fake_graphs")
def test_one_new_token_needs_no_graph(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    generated, seen = on_ranks(
        1, lambda group: (generate(group, tmp_path, True, Limits(1)), here())
    )[0]
    assert [len(tokens) for tokens in generated.tokens] == [1, 1, 1]
    assert (seen.captures, generated.capture_seconds) == (0, None)


@pytest.mark.usefixtures("fake_graphs")
def test_a_step_that_cannot_be_captured_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path)
    decode = LlamaModel.decode

    def synchronizing(model: LlamaModel, *args: Any) -> Tensor:
        if here().recording:
            raise RuntimeError("operation not permitted when stream is capturing")
        return decode(model, *args)

    monkeypatch.setattr(LlamaModel, "decode", synchronizing)
    with pytest.raises(JobError, match=r"cannot be captured as a CUDA graph: operation not .*; --"):
        on_ranks(1, lambda group: generate(group, tmp_path, True, Limits(4)))


def test_calls_in_a_capture_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        rank_in_group, world_size, device = 0, 2, torch.device("cuda:0")

        def all_reduce_(self, x: Tensor) -> Tensor:
            return x.add_(1)

    def no_event(**_: object) -> None:
        raise AssertionError("an event would become a node of the graph")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", no_event)
    assert TimedGroup(OnGpu()).all_reduce_(torch.zeros(1)) == 1
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert TimedGroup(OnGpu(), timed=False).all_reduce_(torch.zeros(1)) == 1
    with pytest.raises(AssertionError, match="an event"):
        TimedGroup(OnGpu()).all_reduce_(torch.zeros(1))
