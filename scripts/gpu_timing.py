"""Timing of collectives on GPUs, one process a GPU; the method of docs/benchmarks/README.md.

Graph times: a CUDA graph of N calls, replayed with both GPUs aligned (a spin kernel, so that the
whole graph is queued before it starts, then a tiny collective as a barrier on the devices). A
replay counts as the smaller of the ranks' times, since the larger one contains the skew of their
starts. The median of the replays is reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from communicators.group import Group

Call = Callable[[], object]


def calls_per_graph(nbytes: int) -> int:
    """50 up to 4 MB, 20 up to 64 MB, 10 above."""
    return 50 if nbytes <= 4 << 20 else 20 if nbytes <= 64 << 20 else 10


class Timer:
    """Times calls on this rank's GPU together with the other ranks'.

    Args:
        device_barrier: a tiny collective on the current stream; it must work in eager mode.
    """

    def __init__(self, group: Group, device: torch.device, device_barrier: Call) -> None:
        self.group = group
        self.device = device
        self.device_barrier = device_barrier
        self.stream = torch.cuda.Stream(device)

    def capture(self, body: Call, calls: int) -> torch.cuda.CUDAGraph:
        """A graph of `calls` times `body`, warmed up first."""
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                body()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            for _ in range(calls):
                body()
        return graph

    def replays(self, graph: torch.cuda.CUDAGraph, samples: int) -> list[float]:
        """us of each replay on this rank."""
        times = []
        with torch.cuda.stream(self.stream):
            graph.replay()
            torch.cuda.synchronize(self.device)
            self.group.barrier()
            for _ in range(samples):
                begin = torch.cuda.Event(enable_timing=True)
                end = torch.cuda.Event(enable_timing=True)
                torch.cuda._sleep(400_000)  # cycles, about 200 us
                self.device_barrier()
                begin.record()
                graph.replay()
                end.record()
                torch.cuda.synchronize(self.device)
                times.append(begin.elapsed_time(end) * 1e3)
        return times

    def medians(self, replays: dict[str, list[float]]) -> dict[str, float]:
        """The median over replays of the smaller of the ranks' times, for each name. Collective."""
        everybody = self.group.gather_objects("times", replays)
        return {
            name: statistics.median(
                min(one) for one in zip(*(r[name] for r in everybody), strict=True)
            )
            for name in replays
        }

    def graph_us(self, call: Call, nbytes: int, samples: int = 15) -> float:
        """us a call, back to back in a graph."""
        calls = calls_per_graph(nbytes)
        graph = self.capture(call, calls)
        return self.medians({"call": self.replays(graph, samples)})["call"] / calls

    def after_producer_us(self, call: Call, produce: Call, nbytes: int, samples: int = 15) -> float:
        """us that the call adds behind a kernel that writes its input."""
        calls = calls_per_graph(nbytes)

        def both() -> None:
            produce()
            call()

        with_call = self.capture(both, calls)
        without = self.capture(produce, calls)
        times = {"with": [], "without": []}  # type: dict[str, list[float]]
        for _ in range(3):  # in turn, so that a drift meets both
            times["with"] += self.replays(with_call, samples // 3)
            times["without"] += self.replays(without, samples // 3)
        medians = self.medians(times)
        return (medians["with"] - medians["without"]) / calls

    def eager_us(self, call: Call, nbytes: int, samples: int = 21) -> float:
        """us a call from Python, back to back, by the host's clock until the device is done."""
        calls = 200 if nbytes <= 1 << 20 else 50 if nbytes <= 32 << 20 else 10
        times = []
        with torch.cuda.stream(self.stream):
            for _ in range(samples):
                call()
                torch.cuda.synchronize(self.device)
                self.group.barrier()
                started = time.perf_counter()
                for _ in range(calls):
                    call()
                torch.cuda.synchronize(self.device)
                times.append((time.perf_counter() - started) * 1e6 / calls)
        return self.medians({"call": times})["call"]
