"""W tensor-parallel ranks as W threads of this process: numerics without starting processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
DEADLINE_S = 60.0


class ThreadGroup:
    """The part of a GroupCoordinator that the job uses; sums in rank order in fp32."""

    def __init__(self, rank: int, shared: list[Any], barrier: threading.Barrier) -> None:
        self.rank_in_group, self.world_size = rank, len(shared)
        self.device = torch.device("cpu")
        self._shared, self._barrier = shared, barrier

    def _exchange(self, value: Any) -> list[Any]:
        self._shared[self.rank_in_group] = value
        self._barrier.wait(DEADLINE_S)
        values = list(self._shared)
        self._barrier.wait(DEADLINE_S)
        return values

    def all_reduce_(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x, dtype=torch.float32)
        for part in self._exchange(x.clone()):
            total += part
        return x.copy_(total)

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        return torch.cat(self._exchange(x.clone()), dim)

    def gather(self, x: Tensor, dst: int = 0, dim: int = -1) -> Tensor | None:
        whole = self.all_gather(x, dim)
        return whole if self.rank_in_group == dst else None

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        return x.copy_(self._exchange(x.clone())[src])

    def broadcast_object(self, obj: object = None, src: int = 0) -> Any:
        return self._exchange(obj)[src]


def on_ranks(world_size: int, work: Callable[[ThreadGroup], T]) -> list[T]:
    """``work(group)`` on every rank; the results in rank order, or the first rank's error."""
    shared: list[Any] = [None] * world_size
    barrier = threading.Barrier(world_size)
    # One compute thread a rank: a pool of its own for each would fight over the cores.
    with ThreadPoolExecutor(world_size, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [
            pool.submit(work, ThreadGroup(rank, shared, barrier)) for rank in range(world_size)
        ]
        return [future.result(DEADLINE_S) for future in futures]
