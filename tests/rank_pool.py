"""Ranks as processes with gloo between them, started once for many tests.

A test is a module-level function `f(process_group, *arguments)`; it runs on ranks 0..world_size-1
and returns what can be pickled. Processes import torch once, so a case costs milliseconds.
"""

from __future__ import annotations

import datetime
import multiprocessing as mp
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

import torch.distributed as dist

_TIMEOUT_S = 60.0
_VENDORS = ("hccl",)  # registered over gloo; torch lets nobody else be called "xccl"


def _gloo(store, rank, size, timeout):
    return dist.ProcessGroupGloo(store, rank, size, timeout=timeout)


def _body(rank: int, size: int, path: str, pipe: Any) -> None:
    timeout = datetime.timedelta(seconds=_TIMEOUT_S)
    for backend in _VENDORS:
        dist.Backend.register_backend(backend, _gloo, devices=["cpu"])
    dist.init_process_group(
        "gloo", store=dist.FileStore(path, size), rank=rank, world_size=size, timeout=timeout
    )
    groups = {  # by all processes in one order, members or not
        (members, backend): dist.new_group(list(range(members)), timeout, backend)
        for members in range(1, size + 1)
        for backend in ("gloo", *_VENDORS)
    }
    while (job := pipe.recv()) is not None:
        function, world_size, backend, arguments = job
        try:
            pipe.send((None, function(groups[world_size, backend], *arguments)))
        except Exception as error:  # noqa: BLE001  (handed to the test)
            pipe.send((f"rank {rank}: {error!r}\n{traceback.format_exc()}", None))
    dist.destroy_process_group()


class RankPool:
    """`size` processes; run() uses the first world_size of them. Close it, or they are killed."""

    def __init__(self, size: int, directory: Any) -> None:
        context = mp.get_context("spawn")
        self.pipes: list[Any] = []
        self.processes: list[Any] = []
        self.broken = False
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_body, args=(rank, size, str(directory / "store"), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(
        self, world_size: int, function: Callable[..., Any], *arguments: Any, backend: str = "gloo"
    ) -> list[Any]:
        """function(process_group, *arguments) on each rank; the results in rank order."""
        assert not self.broken, "an earlier case left ranks waiting"
        pipes = self.pipes[:world_size]
        for pipe in pipes:
            pipe.send((function, world_size, backend, arguments))
        deadline = time.monotonic() + _TIMEOUT_S
        answers: dict[int, Any] = {}
        while len(answers) < world_size:
            waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in answers]
            ready = connection.wait(waiting, max(0.0, deadline - time.monotonic()))
            for pipe in ready:
                answers[pipes.index(pipe)] = pipe.recv()
            errors = [error for error, _ in answers.values() if error is not None]
            if errors:  # the others wait for this rank: the pool is of no further use
                self.broken = len(answers) < world_size
            assert not errors, "\n".join(errors)
            assert ready, f"no answer within {_TIMEOUT_S:g} s of all ranks but {sorted(answers)}"
        return [answers[rank][1] for rank in range(world_size)]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(0.1 if self.broken else 10)
            if process.is_alive():
                process.kill()
                process.join()
