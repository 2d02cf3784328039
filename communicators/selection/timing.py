"""The one instrument by which collectives are timed, for `communicators tune` and the benchmarks.

Graph times: a CUDA graph of N calls, replayed with the ranks' GPUs aligned (a spin kernel, so that
the whole graph is queued before it starts, then a tiny collective as a barrier on the devices).
Eager times: back-to-back calls from Python by the host's clock, until the device is done. A sample
counts as the smaller of the ranks' times, since the larger one contains the skew of their starts.
The median of the samples is reported. On a CPU there are eager times alone.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from ..groups.group import Group

Call = Callable[[], object]

_SPIN_CYCLES = 600_000  # about 0.3 ms: longer than the host takes to queue a graph
_BATCH_US = 5000  # back-to-back eager calls of one sample together
_MOST_IN_BATCH = 500  # below what a device's queue of launches holds


def calls_per_graph(nbytes: int) -> int:
    """50 up to 4 MB, 20 up to 64 MB, 10 above."""
    return 50 if nbytes <= 4 << 20 else 20 if nbytes <= 64 << 20 else 10


def queued_us(run: Call, device: torch.device | None = None, align: Call = lambda: None) -> float:
    """us of the GPU's time for what `run` queues on the current stream.

    A spin kernel keeps the GPU busy until all of it is queued, so that the host's time for a launch
    is no part of it.

    Args:
        align: queued between the two: a collective that lets go of all GPUs together.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_SPIN_CYCLES)
    align()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) * 1e3


def median_of_least(samples: Sequence[Sequence[float]]) -> float:
    """The median of the samples, each the least of the ranks'; samples[rank][number]."""
    return statistics.median(min(one) for one in zip(*samples, strict=True))


class Timer:
    """Times calls of this rank together with the other ranks'. Its methods are collective.

    Args:
        align: a tiny collective on the current stream; it must work in eager mode.
    """

    def __init__(self, group: Group, device: torch.device, align: Call) -> None:
        self.group = group
        self.device = device
        self.align = align
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def capture(
        self, body: Call, calls: int, scope: AbstractContextManager[object] | None = None
    ) -> torch.cuda.CUDAGraph:
        """A graph of `calls` times `body`, warmed up first; captured within `scope`."""
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                body()
        self._synchronize()
        graph = torch.cuda.CUDAGraph()
        with scope or contextlib.nullcontext(), torch.cuda.graph(graph, stream=self.stream):
            for _ in range(calls):
                body()
        return graph

    def replays(self, graph: torch.cuda.CUDAGraph, samples: int) -> list[float]:
        """us of each replay on this rank."""
        with torch.cuda.stream(self.stream):
            graph.replay()
            self._synchronize()
            self.group.barrier()
            return [queued_us(graph.replay, self.device, self.align) for _ in range(samples)]

    def graph_us(
        self,
        call: Call,
        nbytes: int,
        samples: int = 15,
        scope: AbstractContextManager[object] | None = None,
    ) -> float:
        """us per call, back to back in a graph."""
        calls = calls_per_graph(nbytes)
        graph = self.capture(call, calls, scope)
        return self._median(self.replays(graph, samples)) / calls

    def after_producer_us(self, call: Call, produce: Call, nbytes: int, samples: int = 15) -> float:
        """us that the call adds behind a kernel that writes its input."""
        calls = calls_per_graph(nbytes)

        def both() -> None:
            produce()
            call()

        with_call = self.capture(both, calls)
        without = self.capture(produce, calls)
        times: tuple[list[float], list[float]] = [], []
        for _ in range(3):  # in turn, so that a drift meets both
            times[0].extend(self.replays(with_call, samples // 3))
            times[1].extend(self.replays(without, samples // 3))
        return (self._median(times[0]) - self._median(times[1])) / calls

    def eager_us(self, call: Call, samples: int = 15) -> float:
        """us per call from Python, back to back, by the host's clock until the device is done."""
        with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
            self._batch_us(call, 1)  # what only a first call does
            slowest = max(self.group.gather_objects("first look", self._batch_us(call, 3)))
            calls = int(min(max(_BATCH_US / slowest, 1), _MOST_IN_BATCH))
            return self._median([self._batch_us(call, calls) for _ in range(samples)])

    def _batch_us(self, call: Call, calls: int) -> float:
        """us per call, of `calls` calls that the ranks begin together."""
        self.align()
        self._synchronize()
        self.group.barrier()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        self._synchronize()
        return (time.perf_counter() - started) * 1e6 / calls

    def _median(self, mine: list[float]) -> float:
        return median_of_least(self.group.gather_objects("times", mine))

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
