"""Ranks as threads of one process, meeting at a HashStore: for the host-side logic alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from communicators import Group, Settings


def run_ranks(world_size: int, function: Callable[[Group], Any], timeout_s: float = 5.0) -> list:
    """function(group) on each rank; what it returned or raised, in rank order."""
    store = dist.HashStore()
    results: list[Any] = [None] * world_size

    def body(rank: int) -> None:
        try:
            group = Group(store, rank, world_size, settings=Settings(timeout_s=timeout_s))
            results[rank] = function(group)
        except Exception as error:  # noqa: BLE001  (handed to the test)
            results[rank] = error

    threads = [
        threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(world_size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s + 10)
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return results
