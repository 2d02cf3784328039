"""CPU shared memory and processes: forked children, exits, pid namespaces, deaths while joining."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from communicators import CommunicatorError, Settings, shm
from communicators.groups.calls import Call
from tests.faults import exits
from tests.faults.test_shm_faults import opened
from tests.ranks import Rank, run_fresh

DEAD_S = 2.0


def in_child(action: Callable[[], Any]) -> str:
    """What `action` returns or raises in a forked child, which must end by itself."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(20)
            said = str(action())
        except BaseException as error:  # noqa: BLE001  (told to the parent)
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode()[:4000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    status = os.waitpid(pid, 0)[1]
    assert status == 0, f"the child ended with {status}"
    return said


def calls_in_children(rank: Rank) -> list[str]:
    cpu = opened(rank, timeout_s=20.0)
    handle, x = cpu._handle, torch.full((8,), 1000.0)
    calls: list[Callable[[], Any]] = [
        lambda: cpu.all_reduce(x),
        lambda: cpu.all_reduce_(x),
        lambda: cpu.all_gather(x),
        lambda: cpu.gather(x, 0),
        lambda: cpu.reduce_scatter(x),
        lambda: cpu.broadcast(x, 0),
        lambda: cpu.send_tensor_list([x], 1 - rank.rank),
        lambda: cpu.recv_tensor_list(1 - rank.rank),
        cpu.barrier,
        lambda: cpu.all_reduce(x[:0]),
        lambda: shm.shm_allreduce(handle, x),
        lambda: shm.join_shm_manager(handle, "again"),
    ]
    said = [in_child(call) for call in calls]
    for close in (cpu.close, lambda: shm.close_shm_manager(handle)):
        assert in_child(close) == "None"
    # The parent's group is as it was.
    assert cpu.all_reduce(torch.ones(3)).tolist() == [2.0] * 3
    assert subprocess.run(["true"]).returncode == 0
    cpu.barrier()
    return said


def test_a_forked_child_is_refused_and_its_close_does_nothing() -> None:
    for outcome in run_fresh(2, calls_in_children):
        assert not outcome.error, outcome.trace
        for said in outcome.value:
            assert said.startswith("RefusedError: "), said
            assert "belongs to process" in said and "its forked child" in said


def forks_while_calling(rank: Rank) -> None:
    """A thread forks at any moment of the calls of another; children open a group of their own."""
    cpu = opened(rank, timeout_s=20.0)
    refused: list[str] = []

    def fork() -> None:
        for _ in range(8):
            refused.append(in_child(lambda: cpu.all_reduce_(torch.ones(3))))

    forking = threading.Thread(target=fork)
    forking.start()
    for _ in range(500):
        assert cpu.all_reduce(torch.ones(3)).tolist() == [2.0] * 3
    forking.join()
    assert all(said.startswith("RefusedError") for said in refused), refused

    def own_group() -> float:
        settings = Settings(timeout_s=20.0)
        name = f"children-{rank.store_port}"
        handle = shm.init_shm_manager(name, 2, rank.rank, 1, settings)
        shm.join_shm_manager(handle, name)
        x = torch.ones(3)
        shm.shm_allreduce(handle, x)
        shm.close_shm_manager(handle)
        return float(x[0])

    assert in_child(own_group) == "2.0"
    cpu.barrier()


def test_forks_in_the_midst_of_calls() -> None:
    for outcome in run_fresh(2, forks_while_calling):
        assert not outcome.error, outcome.trace


def survivor(name: str, report: int) -> None:
    handle = shm.init_shm_manager(name, 2, 0, settings=Settings(timeout_s=4.0))
    shm.join_shm_manager(handle, name)
    os.write(report, b"joined ")
    try:
        shm.shm_allreduce(handle, torch.ones(1000))
    except CommunicatorError as error:
        os.write(report, f"{type(error).__name__} {error}".encode())


def victim(name: str, report: int, has_child: bool) -> None:
    handle = shm.init_shm_manager(name, 2, 1, settings=Settings(timeout_s=30.0))
    shm.join_shm_manager(handle, name)
    if has_child and os.fork() == 0:
        time.sleep(8.0)  # longer than anybody waits for it
        os._exit(0)
    os.write(report, b"joined")
    time.sleep(60.0)


def one_goes(rank: Rank, name: str, way: str) -> tuple[str, float]:
    """What rank 0 says, and how long after rank 1 went. Each is a child, in a pid namespace of its
    own with `way` "namespaces"."""
    apart = way == "namespaces"
    if apart:  # no thread can be started after it
        warm = [Call(lambda _: time.sleep(0.05)) for _ in range(4)]
        for call in warm:
            while not call.done:
                call.poll(1.0)
            call.leave()
    if apart and ctypes.CDLL(None).unshare(0x20000000) != 0:  # CLONE_NEWPID: of children
        return "skip", 0.0
    group = rank.group(timeout_s=30.0)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            if rank.rank == 0:
                survivor(name, writing)
            else:
                victim(name, writing, has_child=way == "child")
        finally:
            os._exit(0)
    os.close(writing)
    assert os.read(reading, 10).startswith(b"joined")
    group.gather_objects("joined", True)
    said = ""
    if rank.rank == 1:
        time.sleep(0.3)
        os.kill(pid, signal.SIGSTOP if way == "stopped" else signal.SIGKILL)
    group.gather_objects("gone", True)
    started = time.monotonic()
    if rank.rank == 0:
        said = os.read(reading, 4000).decode()
    took = time.monotonic() - started
    group.gather_objects("said", True)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return said, took


@pytest.mark.parametrize("way", ("killed", "child", "namespaces", "stopped"))
def test_the_dead_and_the_late_are_told_apart(way: str) -> None:
    """Also where pids say nothing, and where a child keeps all that was open."""
    outcomes = run_fresh(2, one_goes, f"goes-{way}-{os.getpid()}", way)
    assert not any(outcome.error for outcome in outcomes), outcomes
    if any(outcome.value[0] == "skip" for outcome in outcomes):
        pytest.skip("this user may not make pid namespaces")
    said, took = outcomes[0].value
    if way == "stopped":
        assert said.startswith("CommTimeoutError"), said
    else:
        assert said.startswith("PeerDiedError") and "rank 1 (" in said and "died" in said, said
        assert took < DEAD_S


def dies_before_it_joins(rank: Rank) -> None:
    group = rank.group(timeout_s=20.0)
    handle = shm.init_shm_manager("dies", 3, rank.rank, settings=Settings(timeout_s=30.0))
    addresses = group.gather_objects("addresses", shm.shm_address(handle))
    if rank.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    shm.join_shm_manager(handle, f"dies-{rank.store_port}", addresses)


def test_a_death_before_the_join_is_noticed_at_once() -> None:
    outcomes = run_fresh(3, dies_before_it_joins)
    assert outcomes[2].killed
    for outcome in outcomes[:2]:
        assert outcome.error == "PeerDiedError", outcome
        assert "died, or gave up" in outcome.message
        assert outcome.seconds < 10.0  # with the time to load and to open


def threads_of_vllm(rank: Rank, name: str) -> list[float]:
    """As vLLM's CPU communicator calls them."""
    handle = shm.init_shm_manager(name, rank.world_size, rank.rank, torch.get_num_threads())
    assert shm.join_shm_manager(handle, name) == name
    x = torch.full((4, 3), 1.0 + rank.rank)
    shm.shm_allreduce(handle, x)
    parts = [torch.empty(4, 3) for _ in range(2)] if rank.rank == 1 else None
    shm.shm_gather(handle, x, parts, 1)
    joined = torch.empty(8, 3)
    shm.shm_all_gather(handle, x, joined)
    if rank.rank == 0:
        shm.shm_send_tensor_list(handle, [x, joined], 1)
    else:
        got = shm.shm_recv_tensor_list(handle, 0)
        assert [tuple(one.shape) for one in got] == [(4, 3), (8, 3)]
    assert parts is None or all(torch.equal(part, x) for part in parts)
    with pytest.raises(CommunicatorError, match="thread_num=0"):
        shm.init_shm_manager(name, rank.world_size, rank.rank, 0)
    return [float(x[0, 0]), float(joined.sum())]


def test_the_arguments_of_vllm() -> None:
    outcomes = run_fresh(2, threads_of_vllm, f"vllm-{os.getpid()}")
    assert [outcome.value for outcome in outcomes] == [[3.0, 72.0]] * 2, outcomes


def test_a_process_exits_with_its_own_code() -> None:
    """A few times each here; by hand a hundred times."""
    ran = [
        subprocess.run(
            [sys.executable, "-m", "tests.faults.exits", "1", *arguments],
            capture_output=True,
            text=True,
            timeout=100,
        )
        for arguments in (["exit"], ["return,raise,os._exit,handler", "broadcast"])
    ]
    lines = [line for one in ran for line in one.stdout.splitlines()]
    assert len(lines) == len(exits.CASES) + 4, ran
    for line in lines:
        ending, code = line.split(" ", 1)[1].split(": ")
        assert int(code.split()[0]) == exits.CODES[ending], (line, ran)
