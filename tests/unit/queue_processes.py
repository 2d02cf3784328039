"""Reader processes for tests of MessageQueue: a script runs in each, and says how it went."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from communicators.message_queue import native_end
from communicators.settings import Settings
from communicators.shm_broadcast import Handle, MessageQueue

DEADLINE_S = 60.0
#: No spinning: the tests run on machines with fewer cores than processes.
SETTINGS = Settings(timeout_s=DEADLINE_S, queue_spin_us=200)


def _main(
    pipe: Any, handle: Handle, rank: int, script: Callable[..., Any], *arguments: Any
) -> None:
    try:
        queue = MessageQueue.create_from_handle(handle, rank, settings=SETTINGS)
        pipe.send(("joined", None))
        pipe.send(("done", script(queue, *arguments)))
    except Exception as error:  # noqa: BLE001  # it is what the test looks at
        pipe.send((type(error).__name__, str(error)))


class Reader:
    """A process that joined the queue and runs `script(queue, *arguments)`."""

    def __init__(
        self,
        handle: Handle,
        rank: int,
        script: Callable[..., Any],
        *arguments: Any,
        method: str = "fork",
    ) -> None:
        context: Any = multiprocessing.get_context(method)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_main, args=(theirs, handle, rank, script, *arguments), daemon=True
        )
        self.process.start()
        theirs.close()

    def answer(self) -> tuple[str, Any]:
        """("joined", None) first; then ("done", result), or (the error's class, its text)."""
        assert self.pipe.poll(DEADLINE_S), "the reader has not answered"
        return self.pipe.recv()

    def result(self) -> Any:
        """What the script returned."""
        assert self.answer() == ("joined", None)
        kind, value = self.answer()
        assert kind == "done", f"{kind}: {value}"
        return value

    def kill(self) -> None:
        self.process.kill()
        self.process.join(DEADLINE_S)


@contextlib.contextmanager
def readers(
    queue: MessageQueue, ranks: list[int], script: Callable[..., Any], *arguments: Any, **how: Any
) -> Iterator[list[Reader]]:
    """One process a rank, which are gone when the context ends."""
    made = [Reader(queue.export_handle(), rank, script, *arguments, **how) for rank in ranks]
    try:
        yield made
    finally:
        for reader in made:
            if reader.process.is_alive():
                reader.process.join(0.5)
                reader.kill()
            reader.pipe.close()


def local_queue(n_reader: int, **options: Any) -> MessageQueue:
    return MessageQueue(n_reader, n_reader, settings=SETTINGS, **options)


def both_ends(n_reader: int = 1, **options: Any) -> tuple[MessageQueue, list[MessageQueue]]:
    """The writer and all readers in this process."""
    queue = local_queue(n_reader, **options)
    handle = queue.export_handle()
    return queue, [
        MessageQueue.create_from_handle(handle, rank, settings=SETTINGS) for rank in range(n_reader)
    ]


@pytest.fixture(params=["native end", "python end"])
def either_end(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test twice: with the native module, and with what stands in for it (spawned children
    have the module in both)."""
    if request.param == "python end":
        monkeypatch.setattr(native_end, "module", lambda: None)


def traces() -> list[str]:
    """What a queue could leave on the host: shared memory with a name, and sockets.

    multiprocessing's and torch's own are left out: other programs come and go while we look.
    """
    files = [f for f in os.listdir("/dev/shm") if not f.startswith(("sem.", "torch_", "psm_"))]
    sockets = Path("/proc/net/unix").read_text().splitlines()
    return sorted(files) + sorted(s for s in sockets if "message-queue" in s)


def eventually(check: Callable[[], bool], within: float = 10.0) -> bool:
    until = time.monotonic() + within
    while time.monotonic() < until:
        if check():
            return True
        time.sleep(0.005)
    return check()
