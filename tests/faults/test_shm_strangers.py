"""Other users of the machine at the sockets over which CPU ranks pass their descriptors: they get
nothing, and the group opens, or says in time who is in its way."""

from __future__ import annotations

import array
import contextlib
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from communicators import CpuCommunicator, Settings, shm
from tests.ranks import Outcome, Rank, run_fresh

STRANGER = 65534
TIMEOUT_S = 1.5
SOON_S = 5.0

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user, too")


def address(name: str, rank: int, user: int = 0) -> str:
    return f"\0device-communicators/{user}/{name}/{rank}"


def descriptors(connection: socket.socket) -> int:
    """How many came with the next message; 0 also if there is none."""
    with contextlib.suppress(OSError):
        size = 4 * array.array("i").itemsize
        return len(connection.recvmsg(4096, socket.CMSG_SPACE(size))[1])
    return 0


@contextlib.contextmanager
def stranger(body: Callable[[], Iterator[int]]) -> Iterator[Callable[[], int]]:
    """Another user's process, in which `body` begins, yields once that is done, and then yields the
    descriptors that it got, again and again. What is given ends it and says how many it got."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgid(STRANGER)
            os.setuid(STRANGER)
            steps, stopped = body(), []
            signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
            next(steps)
            os.write(writing, b"r")
            total = 0
            while not stopped:
                total += next(steps)
                time.sleep(0.002)
            os.write(writing, struct.pack("i", total + next(steps)))
        finally:
            os._exit(0)
    os.close(writing)
    assert os.read(reading, 1) == b"r"
    ended = []

    def end() -> int:
        os.kill(pid, signal.SIGTERM)
        found = os.read(reading, 4)
        ended.append(pid)
        os.waitpid(pid, 0)
        assert len(found) == 4, "the stranger failed"
        return struct.unpack("i", found)[0]

    try:
        yield end
    finally:
        if not ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(reading)


def squats(name: str, ranks: list[int], kind: int, listens: bool) -> Callable[[], Iterator[int]]:
    """Takes the names of these ranks before they do."""

    def body() -> Iterator[int]:
        taken = []
        for rank in ranks:
            taken.append(socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK))
            taken[-1].bind(address(name, rank))
            if listens:
                taken[-1].listen(64)
        connected: list[socket.socket] = []
        yield 0
        while True:
            for one in taken if listens else ():
                with contextlib.suppress(BlockingIOError):
                    connected.append(one.accept()[0])
                    connected[-1].setblocking(False)
            yield sum(map(descriptors, connected if listens else taken))

    return body


def visits() -> Iterator[int]:
    """Connects to every socket of the kind that there is, again and again, and says nothing."""
    connected: dict[str, list[socket.socket]] = {}
    yield 0
    while True:
        for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[4] != "0005" or len(fields) < 8 or not fields[7].startswith("@"):
                continue
            mine = connected.setdefault(fields[7], [])
            if len(mine) < 5:
                mine.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                mine[-1].setblocking(False)
                with contextlib.suppress(OSError):
                    mine[-1].connect("\0" + fields[7][1:])
        yield sum(descriptors(one) for every in connected.values() for one in every)


def name_hash(name: str) -> int:
    value = 14695981039346656037
    for byte in name.encode():
        value = (value ^ byte) * 1099511628211 % (1 << 64)
    return value


def lies(name: str) -> Callable[[], Iterator[int]]:
    """Tells rank 0 that it is rank 1, with a file of its own."""

    def body() -> Iterator[int]:
        hello = struct.pack("8sIiiIQ", b"devcomm", 2, 1, 2, 0, name_hash(name))
        mine = os.memfd_create("mine")
        os.ftruncate(mine, 1 << 26)
        yield 0
        while True:
            one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with contextlib.suppress(OSError):
                one.connect(address(name, 0))
                socket.send_fds(one, [hello], [mine])
            one.close()
            yield 0

    return body


def by_name(rank: Rank, name: str, timeout_s: float = 30.0, after_s: float = 0.0) -> float:
    rank.group(timeout_s=30.0).gather_objects("here", True)
    shm.load()
    if rank.rank == 1:
        time.sleep(after_s)
    handle = shm.init_shm_manager(name, 2, rank.rank, settings=Settings(timeout_s=timeout_s))
    shm.join_shm_manager(handle, name)
    x = torch.full((8,), 1.0 + rank.rank)
    shm.shm_allreduce(handle, x)
    return float(x[0])


def through_a_group(rank: Rank) -> float:
    group = rank.group(timeout_s=30.0)
    cpu = CpuCommunicator(group, torch.device("cpu"), Settings(timeout_s=20.0))
    assert cpu.refusal is None, cpu.refusal
    return float(cpu.all_reduce(torch.full((8,), 1.0 + rank.rank))[0])


def unique(kind: str) -> str:
    return f"strangers-{kind}-{os.getpid()}-{time.monotonic_ns()}"


@pytest.mark.parametrize("ranks", ([0, 1], [1], [0]))
def test_a_taken_name_is_an_error_that_names_the_user(ranks: list[int]) -> None:
    name = unique("taken")
    with stranger(squats(name, ranks, socket.SOCK_SEQPACKET, True)) as end:
        outcomes = run_fresh(2, by_name, name, TIMEOUT_S)
        assert end() == 0
    errors = [outcome.error for outcome in outcomes]
    assert errors[ranks[0]] == "RefusedError", outcomes
    assert all(e in ("RefusedError", "PeerDiedError", "CommTimeoutError") for e in errors), outcomes
    text = f"user {STRANGER} (pid "
    assert text in outcomes[ranks[0]].message, outcomes
    assert f"has taken the socket name of rank {ranks[0]}" in outcomes[ranks[0]].message


def check_late(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        assert outcome.error == "CommTimeoutError", outcome
        assert outcome.seconds < TIMEOUT_S + SOON_S


def test_a_name_that_is_taken_and_silent_ends_with_the_deadline() -> None:
    name = unique("silent")
    with stranger(squats(name, [0, 1], socket.SOCK_SEQPACKET, False)) as end:
        outcomes = run_fresh(2, by_name, name, TIMEOUT_S)
        assert end() == 0
    check_late(outcomes)
    assert "any user of the machine may have taken it" in outcomes[0].message


@pytest.mark.parametrize("kind", (socket.SOCK_DGRAM, socket.SOCK_STREAM))
def test_sockets_of_other_kinds_get_nothing(kind: int) -> None:
    """Whether they are in the way depends on the kernel."""
    name = unique("kind")
    with stranger(squats(name, [0, 1], kind, kind == socket.SOCK_STREAM)) as end:
        outcomes = run_fresh(2, by_name, name, TIMEOUT_S)
        assert end() == 0
    if outcomes[0].error:
        check_late(outcomes)
    else:
        assert [outcome.value for outcome in outcomes] == [3.0, 3.0]


def test_visitors_do_not_keep_a_group_from_opening() -> None:
    with stranger(visits) as end:
        named = run_fresh(2, by_name, unique("visited"), 30.0, 0.4)
        outcomes = run_fresh(3, through_a_group)
        assert end() == 0
    assert [outcome.value for outcome in named] == [3.0] * 2, named
    assert [outcome.value for outcome in outcomes] == [6.0] * 3, outcomes


def test_a_liar_is_not_taken_for_a_rank() -> None:
    name = unique("lies")
    with stranger(lies(name)) as end:
        outcomes = run_fresh(2, by_name, name, 30.0, 0.4)
        assert end() == 0
    assert [outcome.value for outcome in outcomes] == [3.0, 3.0], outcomes


def with_silent_callers(rank: Rank, name: str) -> float:
    """As many of this user as like to may connect."""
    callers = []
    if rank.rank == 1:
        deadline = time.monotonic() + 10
        while len(callers) < 200 and time.monotonic() < deadline:
            one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                one.connect(address(name, 0))
                callers.append(one)
            except ConnectionRefusedError:
                time.sleep(0.005)
    return by_name(rank, name)


def test_callers_that_say_nothing_are_not_waited_for() -> None:
    outcomes = run_fresh(2, with_silent_callers, unique("callers"))
    assert [outcome.value for outcome in outcomes] == [3.0, 3.0], outcomes
