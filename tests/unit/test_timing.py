"""The instrument of `tune` and of the benchmarks: what it queues, and what it makes of times."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from communicators import Group
from communicators.selection import timing
from tests.threads import run_ranks


class FakeCuda:
    """torch.cuda as far as the timer uses it; `log` is what was done, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.clock_us = 0.0

    def _sleep(self, cycles: int) -> None:
        self.log.append("spin")

    def synchronize(self, device: Any) -> None:
        self.log.append("synchronize")

    def Stream(self, device: Any) -> str:
        return "stream"

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def graph(self, graph: Any, stream: Any) -> Iterator[None]:
        self.log.append("capture")
        yield
        self.log.append("captured")

    def CUDAGraph(self) -> Any:
        fake = self

        class Graph:
            def replay(self) -> None:
                fake.log.append("replay")
                fake.clock_us += 700

        return Graph()

    def Event(self, enable_timing: bool) -> Any:
        fake = self

        class Event:
            def record(self) -> None:
                fake.log.append("record")
                self.us = fake.clock_us

            def elapsed_time(self, end: Any) -> float:
                return float(end.us - self.us) / 1e3

        return Event()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch, "cuda", fake)
    return fake


def test_the_gpus_are_aligned_before_each_timed_graph(cuda: FakeCuda) -> None:
    @contextlib.contextmanager
    def scope() -> Iterator[None]:
        cuda.log.append("scope")
        yield
        cuda.log.append("left")

    def body(group: Group) -> float:
        timer = timing.Timer(group, torch.device("cuda:0"), lambda: cuda.log.append("align"))
        return timer.graph_us(lambda: cuda.log.append("call"), 20 << 20, samples=3, scope=scope())

    (us,) = run_ranks(1, body)
    assert us == 700 / 20, "a graph of 20 calls at this size"
    made = cuda.log.index("replay")
    warm = ["call"] * 3 + ["synchronize"]
    assert cuda.log[:made] == [*warm, "scope", "capture", *["call"] * 20, "captured", "left"]
    sample = ["spin", "align", "record", "replay", "record", "synchronize"]
    assert cuda.log[made:] == ["replay", "synchronize", *sample * 3]


def test_a_sample_is_the_least_of_the_ranks_and_the_median_of_them_counts() -> None:
    assert timing.median_of_least([[9.0, 2.0, 5.0], [3.0, 8.0, 4.0]]) == 3.0
    with pytest.raises(ValueError):
        timing.median_of_least([[1.0, 2.0], [1.0]])

    def body(group: Group) -> float:
        timer = timing.Timer(group, torch.device("cpu"), lambda: None)
        return timer._median([10.0 + group.rank, 30.0 - group.rank, 20.0])

    assert run_ranks(3, body) == [20.0] * 3


def test_eager_calls_are_as_many_on_all_ranks() -> None:
    def body(group: Group) -> tuple[float, int, int]:
        calls, aligned = [0], [0]

        def count(counter: list[int]) -> None:
            counter[0] += 1

        timer = timing.Timer(group, torch.device("cpu"), lambda: count(aligned))
        us = timer.eager_us(lambda: count(calls), samples=5)
        return us, calls[0], aligned[0]

    one, other = run_ranks(2, body)
    assert one == other
    batch, rest = divmod(one[1] - (1 + 3), 5)
    assert 1 <= batch <= 500 and rest == 0, "500 where nothing else keeps the ranks waiting"
    assert one[2] == 1 + 1 + 5 and one[0] > 0


def test_calls_per_graph() -> None:
    for nbytes, calls in ((1, 50), (4 << 20, 50), ((4 << 20) + 1, 20), (64 << 20, 20)):
        assert timing.calls_per_graph(nbytes) == calls
    assert timing.calls_per_graph(256 << 20) == 10
