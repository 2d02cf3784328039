"""A GroupCoordinator that also counts the time its collectives take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class TimedGroup:
    """The collectives that the decoder uses, passed on to ``group`` and timed.

    On a CPU the time of a call counts, the wait for later ranks included. On a GPU it is the time
    between two events on the stream. Only rank-local clocks are read: timing adds no collective.
    Calls that a CUDA graph captures are passed on untimed, and with ``timed=False`` all are.
    """

    def __init__(self, group: Any, timed: bool = True) -> None:
        self.group, self.timed = group, timed
        self.rank_in_group: int = group.rank_in_group
        self.world_size: int = group.world_size
        self.device = torch.device(group.device)
        self.calls = 0
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def all_reduce_(self, x: Tensor) -> Tensor:
        return self._timed(self.group.all_reduce_, x)

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        return self._timed(self.group.all_gather, x, dim)

    def gather(self, x: Tensor, dst: int = 0, dim: int = -1) -> Tensor | None:
        return self._timed(self.group.gather, x, dst, dim)

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        return self._timed(self.group.broadcast, x, src)

    def broadcast_object(self, obj: object = None, src: int = 0) -> Any:
        """Not timed: objects are exchanged before the work starts, not in it."""
        return self.group.broadcast_object(obj, src)

    def take_seconds(self) -> float:
        """Seconds in collectives since the last call of this; waits for the GPU if there is one."""
        seconds, self._seconds = self._seconds, 0.0
        if self._events:
            torch.cuda.synchronize(self.device)
            seconds += sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3
            self._events.clear()
        return seconds

    def _timed(self, call: Callable[..., Any], *args: object) -> Any:
        self.calls += 1
        on_gpu = self.device.type == "cuda"
        if not self.timed or (on_gpu and torch.cuda.is_current_stream_capturing()):
            return call(*args)
        if on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = call(*args)
            end.record()
            self._events.append((begin, end))
            return result
        began = time.perf_counter()
        result = call(*args)
        self._seconds += time.perf_counter() - began
        return result
