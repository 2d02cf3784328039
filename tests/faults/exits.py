"""Processes that end while a daemon thread of theirs waits in a call, for test_exit.py.

    python -m tests.faults.exits REPEATS ENDING,... [WHAT...]

prints "WHAT ENDING: CODE SECONDS" for each, and to stderr what was said where the code is wrong.

Each case is a process forked from this one, which ends as a program does, and a peer that keeps it
waiting. (Forked so that torch is imported once.)
"""

from __future__ import annotations

import atexit
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from communicators import CommunicatorError, Settings, shm
from communicators.message_queue import ends  # noqa: F401  (imported before the forks)
from communicators.shm_broadcast import MessageQueue

SETTINGS = Settings(timeout_s=60.0)
CODES = {"exit": 3, "return": 0, "raise": 1, "os._exit": 4, "handler": 5}
ops = torch.ops.communicators


def joined(rank: int, name: str) -> int:
    handle = shm.init_shm_manager(name, 2, rank, settings=SETTINGS)
    return int(shm.join_shm_manager(handle, name) == name and handle)


def shm_call(call: Callable[[int, torch.Tensor], Any]) -> Callable[[int, str], Callable[[], Any]]:
    """Rank 1 joins and never calls."""

    def prepare(rank: int, name: str) -> Callable[[], Any]:
        handle = joined(rank, name)
        return lambda: call(handle, torch.ones(1 << 20))

    return prepare


def join(rank: int, name: str) -> Callable[[], Any]:
    return (lambda: joined(0, name)) if rank == 0 else (lambda: None)


def loops(rank: int, name: str) -> Callable[[], Any]:
    """Both ranks call all the time; the exit hits any moment of it."""
    handle = joined(rank, name)

    def forever() -> None:
        x = torch.zeros(8)
        while True:
            try:
                shm.shm_allreduce(handle, x)
            except CommunicatorError:
                if rank == 1:
                    return

    if rank == 1:
        forever()
    return forever


def compiled(rank: int, name: str) -> Callable[[], Any]:
    """The operator itself, as a traced graph calls it."""
    handle = joined(rank, name)
    return lambda: ops.shm_barrier(handle)


class Holder:
    """Something that calls when it is collected."""

    def __init__(self, handle: int) -> None:
        self.handle, self.itself = handle, self

    def __del__(self) -> None:
        shm.close_shm_manager(self.handle)


kept: list[Any] = []


def collected(rank: int, name: str) -> Callable[[], Any]:
    """An object in a global and in a cycle closes the group, in which a thread waits."""
    handle = joined(rank, name)
    kept.append(Holder(handle))
    return lambda: shm.shm_allreduce(handle, torch.ones(8))


def queue(call: Callable[[MessageQueue], Any], writes: bool, ready: bool = True) -> Any:
    """Rank 0 has the writing end, or the reading one, and the other end does nothing."""

    def prepare(rank: int, name: str) -> Callable[[], Any]:
        if (rank == 0) == writes:
            mine = MessageQueue(1, 1, max_chunk_bytes=1 << 16, max_chunks=4)
            with open(f"/dev/shm/{name}.new", "wb") as file:
                pickle.dump(mine.export_handle(), file)
            os.rename(f"/dev/shm/{name}.new", f"/dev/shm/{name}")
        else:
            while not os.path.exists(f"/dev/shm/{name}"):
                time.sleep(0.005)
            with open(f"/dev/shm/{name}", "rb") as file:
                mine = MessageQueue.create_from_handle(pickle.load(file), 0)
            os.unlink(f"/dev/shm/{name}")
        kept.append(mine)
        if ready and rank == 0:
            mine.wait_until_ready()
        elif ready:
            threading.Thread(target=mine.wait_until_ready, daemon=True).start()
        return lambda: call(mine)

    return prepare


def fill(mine: MessageQueue) -> None:
    while True:
        mine.enqueue(b"x" * 1000)


CASES: dict[str, Callable[[int, str], Callable[[], Any]]] = {
    "all_reduce": shm_call(shm.shm_allreduce),
    "all_gather": shm_call(lambda h, x: shm.shm_all_gather(h, x, x.new_empty(2 << 20))),
    "gather": shm_call(lambda h, x: shm.shm_gather(h, x, [x.clone(), x.clone()], 0)),
    "reduce_scatter": shm_call(
        lambda h, x: ops.shm_reduce_scatter(x.new_empty(1 << 19), x, 1 << 19, h)
    ),
    "broadcast": shm_call(lambda h, x: ops.shm_broadcast_(x, 1, h)),
    "send": shm_call(lambda h, x: shm.send(h, x, 1)),
    "recv": shm_call(lambda h, x: shm.recv_(h, x, 1)),
    "recv_object": shm_call(lambda h, x: shm.recv_object(h, 1)),
    "barrier": compiled,
    "join": join,
    "loops": loops,
    "collected": collected,
    "dequeue": queue(lambda q: q.dequeue(), writes=False),
    "enqueue": queue(fill, writes=True),
    "ready": queue(lambda q: q.wait_until_ready(), writes=True, ready=False),
}


def peer(what: str, name: str) -> None:
    CASES[what](1, name)
    time.sleep(60.0)


def begin(what: str, ending: str, name: str) -> None:
    """The main thread of a process that ends: after this it does so."""
    waits = CASES[what](0, name)
    begun = threading.Event()

    def body() -> None:
        begun.set()
        waits()

    threading.Thread(target=body, daemon=True).start()
    begun.wait()
    time.sleep(0.05)
    if ending == "handler":
        atexit.register(lambda: os._exit(5))


def forked(action: Callable[[], Any]) -> int:
    """The pid of a child that does it and ends without any of Python's ways."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except Exception:  # noqa: BLE001  (of the peer: it is told, and the case goes on)
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(0)
    return pid


def one_case(what: str, ending: str) -> bool:
    """True in the process that is to end."""
    name = f"exits-{os.getpid()}-{time.monotonic_ns()}"
    other = forked(lambda: peer(what, name))
    sys.stdout.flush()
    said = os.memfd_create("said")  # what threading says of the thread's error
    pid = os.fork()
    if pid == 0:
        os.dup2(said, 2)
        begin(what, ending, name)
        return True
    started = time.monotonic()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(f"{what} {ending}: {code} {time.monotonic() - started:.2f}", flush=True)
    if code != CODES[ending]:
        print(os.pread(said, 10000, 0).decode(), file=sys.stderr, flush=True)
    os.close(said)
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    return False


def all_cases(repeats: int, whats: list[str], endings: list[str]) -> str:
    """The ending of this process, if it is one of those that end."""
    shm.load()
    for what in whats:
        for ending in endings:
            for _ in range(repeats):
                if one_case(what, ending):
                    return ending
    return ""


if __name__ == "__main__":
    end = all_cases(int(sys.argv[1]), sys.argv[3:] or list(CASES), sys.argv[2].split(","))
    if end == "exit":
        sys.exit(3)
    if end == "os._exit":
        os._exit(4)
    if end == "raise":
        raise ValueError("of the program")
