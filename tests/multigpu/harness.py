"""N ranks, one process each, started once for many tests.

A test is a function that runs on all of them, `function(rank: Rank, *args)`, at module level so
that it can be sent by name. It has a deadline; when a rank misses it, every rank's stack is printed
and the ranks are killed. The GPUs are dealt out in turn, so there may be more ranks than GPUs.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from communicators.groups.group import Group
from communicators.settings import Settings


@dataclass
class Rank:
    """What a test function gets: its rank, its group, its device, and a place for what it keeps."""

    rank: int
    world_size: int
    device: torch.device
    group: Group
    kept: dict[str, Any] = field(default_factory=dict)


class RankFailedError(AssertionError):
    """One or more ranks raised, died or were late; the message has their traces."""


class Ranks:
    """Starts `world_size` processes; `device_type` "cuda" deals out the GPUs that a rank sees.

    `environments` has what each rank's environment gets before CUDA starts in it.
    """

    def __init__(
        self,
        world_size: int,
        device_type: str = "cuda",
        settings: Settings | None = None,
        environments: Sequence[Mapping[str, str]] = (),
    ) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.world_size = world_size
        self.pipes: list[multiprocessing.connection.Connection] = []
        self.processes = []
        for rank in range(world_size):
            environment = environments[rank] if environments else {}
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(theirs, rank, world_size, port, device_type, settings, environment),
                daemon=True,
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> list[Any]:
        """What `function` returned on every rank, in rank order; RankFailedError otherwise."""
        answers = self.attempt(function, *args, timeout_s=timeout_s)
        failed = [f"rank {r}: {a[1]}" for r, a in enumerate(answers) if a[0] != "ok"]
        if failed:
            raise RankFailedError("\n".join(failed))
        return [answer for _, answer in answers]

    def attempt(
        self, function: Callable[..., Any], *args: Any, timeout_s: float = 60.0
    ) -> list[tuple[str, Any]]:
        """("ok", result), ("raised", trace), ("died", exit code) or ("late", ...) of every rank."""
        for pipe in self.pipes:
            try:
                pipe.send((function, args, timeout_s))
            except BrokenPipeError:
                continue  # a killed rank; its answer below is "died"
        deadline = time.monotonic() + timeout_s + 10
        answers: list[tuple[str, Any]] = []
        for rank, pipe in enumerate(self.pipes):
            try:
                if pipe.poll(max(deadline - time.monotonic(), 0.0)):
                    answers.append(pipe.recv())
                    continue
                answers.append(("late", f"no answer to {function.__name__} in {timeout_s} s"))
            except (EOFError, ConnectionResetError):
                self.processes[rank].join(5)
                answers.append(("died", f"exit code {self.processes[rank].exitcode}"))
        if any(kind == "late" for kind, _ in answers):
            self.kill()
        return answers

    def close(self) -> None:
        for pipe in self.pipes:
            try:
                pipe.send(None)
            except (BrokenPipeError, OSError):
                continue  # already gone
        for process in self.processes:
            process.join(20)
        self.kill()

    def kill(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()


def _serve(
    pipe: multiprocessing.connection.Connection,
    rank: int,
    world_size: int,
    port: int,
    device_type: str,
    settings: Settings | None,
    environment: Mapping[str, str],
) -> None:
    os.environ.update(environment)
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0)
    group = Group(store, rank, world_size, name="harness", settings=settings)
    me = Rank(rank, world_size, device, group)
    while True:
        order = pipe.recv()
        if order is None:
            return
        function, args, timeout_s = order
        faulthandler.dump_traceback_later(timeout_s, file=sys.stderr)
        try:
            pipe.send(("ok", function(me, *args)))
        except BaseException:  # noqa: BLE001  (whatever it was, the test prints it)
            pipe.send(("raised", traceback.format_exc()))
        finally:
            faulthandler.cancel_dump_traceback_later()
