"""N ranks as processes, for tests.

    ranks = pool(4)                      # started once, shared by the tests of this pytest worker
    results = ranks.run(function, *args) # function(rank: Rank, *args) on each; values in rank order

    outcomes = run_fresh(3, function, *args)   # processes of their own, which may be killed

    ranks = Ranks(2, gpus=True)          # the same with GPUs, for the tests of one module
    ...
    ranks.kill()

`function` is a module-level function; it is found again by its name in the ranks. A call has a
deadline: when it passes, every rank's Python stacks are printed and the ranks are killed.

The ranks are forked from a server that has imported torch and has no threads, so one takes
milliseconds, not the seconds that importing torch takes.
"""

from __future__ import annotations

import atexit
import faulthandler
import importlib
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.connection import Connection, wait
from typing import IO, Any

import torch
from torch._C._distributed_c10d import Store, TCPStore

from communicators import Group, Settings

DEADLINE_S = 60.0

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "communicators.backends.cpu"])


@dataclass
class Rank:
    """What a test function gets: who it is, and a way to meet the others.

    `cache` lives as long as the process: an opened communicator can be kept there. `device` is the
    CPU, or the rank's GPU in `Ranks(gpus=True)`.
    """

    rank: int
    world_size: int
    store_port: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    cache: dict[Any, Any] = field(default_factory=dict)
    _store: Any = None

    def store(self) -> Store:
        """A store that the test's own process hosts, so it survives every rank."""
        if self._store is None:
            self._store = TCPStore("127.0.0.1", self.store_port, is_master=False)
        return self._store

    def group(self, name: str = "test", **settings: Any) -> Group:
        """A Group over all ranks. Collective."""
        return Group(
            self.store(), self.rank, self.world_size, name=name, settings=Settings(**settings)
        )

    @cached_property
    def world(self) -> Group:
        """A Group over all ranks, opened once in the process. Collective at first."""
        return self.group("world")


@dataclass(frozen=True)
class Outcome:
    """How one rank ended: a value, an error, or neither, when it was killed."""

    value: Any = None
    error: str = ""  # name of the exception's class
    message: str = ""
    trace: str = ""
    seconds: float = 0.0
    killed: bool = False


class RanksFailed(AssertionError):
    """Some ranks raised, died or hung."""


def _find(path: tuple[str, str]) -> Callable[..., Any]:
    module, name = path
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _serve(rank: Rank, pipe: Connection, stacks: IO[str]) -> None:
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    torch.set_num_threads(1)
    while True:
        try:
            call = pipe.recv()
        except EOFError:
            return
        started = time.monotonic()
        try:
            value = _find(call[0])(rank, *call[1])
            outcome = Outcome(value=value, seconds=time.monotonic() - started)
        except BaseException as error:  # noqa: BLE001  (handed to the test)
            outcome = Outcome(
                error=type(error).__name__,
                message=str(error),
                trace=traceback.format_exc(),
                seconds=time.monotonic() - started,
            )
        pipe.send(outcome)


def _start(
    rank: Rank, pipe: Connection, stacks_path: str, gpus: bool, environment: Mapping[str, str]
) -> None:
    os.environ.update(environment)
    if gpus:
        rank.device = torch.device("cuda", rank.rank % torch.cuda.device_count())
        torch.cuda.set_device(rank.device)
    with open(stacks_path, "w") as stacks:
        _serve(rank, pipe, stacks)
    os._exit(0)  # no destructors: a rank that ends is a rank that is gone


class Ranks:
    """World size processes that run test functions together.

    With `gpus`, the GPUs that a rank sees are dealt out in turn, so there may be more ranks than
    GPUs. `environments` has what each rank's environment gets before CUDA starts in it.
    """

    def __init__(
        self,
        world_size: int,
        *,
        gpus: bool = False,
        environments: Sequence[Mapping[str, str]] = (),
    ) -> None:
        self.world_size = world_size
        self.failed = False  # a test raised in them: what it left behind is not known
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._stacks = tempfile.TemporaryDirectory(prefix="ranks-")
        self._pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(world_size):
            mine, theirs = _context.Pipe()
            who = Rank(rank, world_size, self._store.port)
            environment = environments[rank] if environments else {}
            process = _context.Process(
                target=_start,
                args=(who, theirs, f"{self._stacks.name}/{rank}", gpus, environment),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self.processes.append(process)

    def outcomes(
        self, function: Callable[..., Any], *args: Any, deadline_s: float = DEADLINE_S
    ) -> list[Outcome]:
        """function(rank, *args) on every rank; how each ended, in rank order."""
        for pipe in self._pipes:
            try:
                pipe.send(((function.__module__, function.__qualname__), args))
            except BrokenPipeError:
                continue  # the rank is gone: its outcome below is "killed"
        found: dict[int, Outcome] = {}
        end = time.monotonic() + deadline_s
        while len(found) < self.world_size:
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in found}
            ready = wait(list(waiting), timeout=max(end - time.monotonic(), 0))
            if not ready:
                text = self._stacks_of(list(waiting.values()))
                self.kill()
                raise RanksFailed(
                    f"ranks {sorted(waiting.values())} of {self.world_size} hang in "
                    f"{function.__qualname__} after {deadline_s:g} s\n{text}"
                )
            for pipe, rank in waiting.items():
                if pipe not in ready:
                    continue
                try:
                    found[rank] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    found[rank] = Outcome(killed=True)
        return [found[rank] for rank in range(self.world_size)]

    def run(
        self, function: Callable[..., Any], *args: Any, deadline_s: float = DEADLINE_S
    ) -> list[Any]:
        """The values of function(rank, *args), in rank order; RanksFailed if a rank raised."""
        outcomes = self.outcomes(function, *args, deadline_s=deadline_s)
        if any(o.error or o.killed for o in outcomes):
            self.failed = True
            raise RanksFailed(
                "\n".join(
                    f"rank {rank}: {'killed' if o.killed else o.trace}"
                    for rank, o in enumerate(outcomes)
                    if o.error or o.killed
                )
            )
        return [o.value for o in outcomes]

    def pid(self, rank: int) -> int:
        return self.processes[rank].pid

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def _stacks_of(self, ranks: list[int]) -> str:
        for rank in ranks:
            if self.processes[rank].is_alive():
                os.kill(self.pid(rank), signal.SIGUSR1)
        time.sleep(1.0)
        texts = []
        for rank in ranks:
            with open(f"{self._stacks.name}/{rank}") as stacks:
                texts.append(f"--- rank {rank}\n{stacks.read()}")
        return "\n".join(texts)


_pools: dict[tuple[int, str], Ranks] = {}


def pool(world_size: int, apart: str = "") -> Ranks:
    """The shared ranks of this world size, started again if a test lost them or failed in them.

    Tests that change the process (a default process group, replaced modules) share ranks `apart`
    from the others, under a name of their own.
    """
    ranks = _pools.get((world_size, apart))
    if ranks is not None and (ranks.failed or not ranks.alive):
        ranks.kill()
        ranks = None
    if ranks is None:
        ranks = _pools[world_size, apart] = Ranks(world_size)
    return ranks


@atexit.register
def _stop() -> None:
    for ranks in _pools.values():
        ranks.kill()


def run_fresh(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    deadline_s: float = DEADLINE_S,
) -> list[Outcome]:
    """function(rank, *args) in processes of their own; how each ended. Ranks may die in it."""
    ranks = Ranks(world_size)
    try:
        return ranks.outcomes(function, *args, deadline_s=deadline_s)
    finally:
        if ranks.alive or any(p.is_alive() for p in ranks.processes):
            ranks.kill()
