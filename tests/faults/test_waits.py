"""Waits on the host side: they hear signals, tell late from dead, and end with the deadline."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from communicators import Group
from communicators.backends.cpu import CpuCommunicator
from communicators.backends.nccl.peer_watch import own_process, watchable
from communicators.errors import RefusedError
from communicators.groups import hosts
from communicators.groups.hosts import Home
from communicators.peer_access.p2p_cache import P2PCache, PairResult, folder_problem
from communicators.peer_access.topology import HostFacts, probe_host
from tests.ranks import Rank, Ranks, run_fresh
from tests.unit.test_stateless import free_port

SOON_S = 2.0


def _interrupt(after_s: float) -> None:
    threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGINT)).start()


def _wait(group: Group, kind: str) -> Any:
    if kind == "barrier":
        return group.barrier()
    if kind == "gather_objects":
        return group.gather_objects("step", group.rank)
    if kind == "recv_object":
        return group.recv_object(1)
    return group.broadcast_object(None, src=1)


def _ends(wait: Callable[[], Any]) -> tuple[str, str, float]:
    """The class and text of the error that ends `wait`, and after how long."""
    started = time.monotonic()
    try:
        wait()
    except Exception as error:  # noqa: BLE001
        return type(error).__name__, str(error), time.monotonic() - started
    return "nothing", "", 0.0


KINDS = ["barrier", "gather_objects", "recv_object", "broadcast_object"]


def _interrupted(rank: Rank, kinds: list[str]) -> list[tuple[str, float, str]]:
    """Rank 0 waits for rank 1, which does nothing, is interrupted, and meets it afterwards."""
    group = rank.group("interrupted", timeout_s=60.0)
    found = []
    for kind in kinds if rank.rank == 0 else []:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _interrupt(0.3)
        started = time.monotonic()
        try:
            _wait(group, kind)
            found.append((kind, 0.0, "returned"))
        except BaseException as error:  # noqa: BLE001
            found.append((kind, time.monotonic() - started, type(error).__name__))
    return found


def test_ctrl_c_ends_every_wait_at_once() -> None:
    outcomes = run_fresh(2, _interrupted, KINDS)
    assert not outcomes[0].error, outcomes[0].trace
    for kind, seconds, name in outcomes[0].value:
        assert name == "KeyboardInterrupt" and seconds < SOON_S, (kind, name, seconds)


def _lose_rank_1(rank: Rank, kind: str, met: bool, name: str) -> tuple[str, str, float]:
    """Rank 1 dies 0.5 s into the others' wait; `met`: after a first round of all."""
    group = rank.group(name, timeout_s=30.0)
    if met:
        group.barrier()
    if rank.rank == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    return _ends(lambda: _wait(group, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("met", [True, False])
def test_a_killed_peer_is_dead_at_once(kind: str, met: bool) -> None:
    outcomes = run_fresh(3, _lose_rank_1, kind, met, f"killed-{kind}")
    assert outcomes[1].killed
    for outcome in (outcomes[0], outcomes[2]):
        name, text, seconds = outcome.value
        assert name == "PeerDiedError", (name, text)
        assert "rank 1 (pid " in text and seconds < 0.5 + SOON_S, text


def _come_and_die(rank: Rank) -> Any:
    """Rank 1 dies in a round that rank 2 never comes to."""
    if rank.rank == 2:
        return None
    group = rank.group("come and die", timeout_s=30.0)
    if rank.rank == 1:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return _ends(group.barrier)


def test_one_who_has_come_and_dies_is_dead_while_another_is_missing() -> None:
    name, text, seconds = run_fresh(3, _come_and_die)[0].value
    assert name == "PeerDiedError" and "rank 1 (pid" in text and seconds < 0.5 + SOON_S, text


def _last_words(rank: Rank) -> Any:
    """Rank 1 sends, takes part in a round, and ends, before rank 0 looks."""
    group = rank.group("last words", timeout_s=20.0)
    group.barrier()
    if rank.rank == 1:
        group.send_object("bye", 0)
        threading.Thread(target=group.gather_objects, args=("last", 7), daemon=True).start()
        time.sleep(0.3)
        os._exit(0)
    time.sleep(1.0)
    started = time.monotonic()
    found = group.recv_object(1), group.gather_objects("last", 0)
    return found, time.monotonic() - started


def test_what_a_peer_did_before_it_ended_counts() -> None:
    outcomes = run_fresh(2, _last_words)
    assert outcomes[0].value[0] == ("bye", [0, 7]), outcomes[0].trace


def _stopped(rank: Rank) -> Any:
    group = rank.group("stopped", timeout_s=1.0)
    group.barrier(20)
    if rank.rank == 1:
        return os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.5)
    return _ends(group.barrier)


def test_a_stopped_peer_is_late_and_not_dead() -> None:
    ranks = Ranks(2)
    timer = threading.Timer(4.0, lambda: os.kill(ranks.pid(1), signal.SIGCONT))
    timer.start()
    try:
        outcome = ranks.outcomes(_stopped)[0]
    finally:
        timer.join()
        ranks.kill()
    name, text, seconds = outcome.value
    assert name == "CommTimeoutError" and "for rank 1 of 2" in text and seconds < 2.5


MEMBER = """
import os, signal, sys, threading, time
from communicators import Settings
from communicators.groups.stateless import StatelessProcessGroup
rank, port, mode = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
deadline = 1.0 if mode == "stop" and rank else 60.0
group = StatelessProcessGroup.create("127.0.0.1", port, rank, 2, timeout_s=60.0,
                                     settings=Settings(timeout_s=deadline))
print(group.port, flush=True)
if mode == "exit":
    for wait in (group.barrier, lambda: group.recv_object(1), lambda: group.send_object(1, 1)):
        threading.Thread(target=wait, daemon=True).start()
    time.sleep(0.2)
    sys.exit(3)
if rank == 0:
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGSTOP if mode == "stop" else signal.SIGKILL)
    time.sleep(60.0)  # as pid 1 of a namespace, which ignores its own signals
started = time.monotonic()
try:
    group.barrier()
except Exception as error:
    print(type(error).__name__, round(time.monotonic() - started, 2), error, flush=True)
"""


def _member(rank: int, mode: str, port: int, *prefix: str) -> subprocess.Popen[str]:
    command = [*prefix, sys.executable, "-c", MEMBER, str(rank), str(port), mode]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def _meet(mode: str, *prefix: str) -> tuple[subprocess.Popen[str], str, int]:
    """Rank 0, and what rank 1 printed and its exit code."""
    port = free_port()
    host, other = _member(0, mode, port, *prefix), _member(1, mode, port, *prefix)
    try:
        text, _ = other.communicate(timeout=60)
        return host, text, other.returncode
    finally:
        host.kill()
        other.kill()


def test_a_stopped_process_that_hosts_the_store_holds_nobody_up() -> None:
    _, text, code = _meet("stop")
    assert code == 0 and "CommTimeoutError" in text and "does not answer" in text, text
    assert float(text.split("CommTimeoutError ")[1].split()[0]) < 3


def test_a_killed_process_that_hosts_the_store_is_named() -> None:
    _, text, _ = _meet("kill")
    assert "PeerDiedError" in text and "rank 0 (pid" in text, text


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_a_death_is_seen_across_pid_namespaces() -> None:
    prefix = ("unshare", "--pid", "--fork", "--kill-child")
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("pid namespaces are not permitted")
    # In a namespace of its own the rank has pid 1, which ignores its own SIGKILL: it is sent one.
    for _ in range(3):  # another test may take the port before rank 0 does
        port = free_port()
        host, other = _member(0, "stop", port, *prefix), _member(1, "kill", port, *prefix)
        assert host.stdout is not None and other.stdout is not None
        if host.stdout.readline() and other.stdout.readline():
            break
        host.kill()
        other.kill()
    try:
        time.sleep(0.3)
        host.kill()
        text, _ = other.communicate(timeout=30)
    finally:
        host.kill()
        other.kill()
    assert "PeerDiedError" in text and "rank 0 (pid 1)" in text, text


def test_a_process_whose_threads_wait_exits_with_its_own_code() -> None:
    port = free_port()
    ranks = [_member(rank, "exit", port) for rank in range(2)]
    assert [rank.wait(60) for rank in ranks] == [3, 3]


def _fork(rank: Rank) -> Any:
    group = rank.group("forked", timeout_s=20.0)
    communicator = CpuCommunicator(group, torch.device("cpu"))
    assert communicator.refusal is None, communicator.refusal
    calls = [
        group.barrier,
        lambda: group.send_object(1, 1 - rank.rank),
        lambda: group.recv_object(1 - rank.rank),
        lambda: group.broadcast_object(1),
        lambda: communicator.all_reduce(torch.ones(4)),
        lambda: communicator.barrier(),
    ]
    answers, answer = os.pipe()
    child = os.fork()
    if child == 0:
        said = []
        for call in calls:
            try:
                call()
                said.append("returned")
            except RefusedError as error:
                said.append("refused" if "forked child" in str(error) else str(error))
        communicator.close()
        os.write(answer, " ".join(said).encode())
        os._exit(5)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    group.barrier()
    total = communicator.all_reduce(torch.full([4], 1000.0)).tolist()
    communicator.close()
    return code, os.read(answers, 1000).decode(), total


def test_a_forked_child_is_refused_and_gives_nothing_back() -> None:
    for outcome in run_fresh(2, _fork):
        assert not outcome.error, outcome.trace
        assert outcome.value == (5, " ".join(["refused"] * 6), [2000.0] * 4)


def test_without_proc_and_home_there_are_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "PROC", tmp_path)
    assert "no boot id" in hosts.missing() and "no pid namespace" in hosts.missing()
    assert probe_host().boot_id and Home.mine() == Home.mine()
    assert watchable({0: own_process(), 1: replace(own_process(), pid=1)}) == {}
    monkeypatch.setenv("HOME", "/dev/null")
    cache = P2PCache("", probe_host(), "1")
    assert cache.path.is_relative_to(tempfile.gettempdir()) and "HOME=/dev/null" in folder_problem(
        ""
    )
    P2PCache("/dev/null/x", probe_host(), "1").add({}, [])
    assert "no directory to write in" in folder_problem("/dev/null/x")


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\xff\x00", b"[]", b"null", b"{}", b'{"pairs": 3}', b"[" * 100000, b"7"]
    + [b'{"format": 2, "boot_id": "b", "driver": "1", "pairs": ' + pairs + b"}"
       for pairs in (b"null", b"[3]", b"[{}]", b'[{"accessor": 1, "owner": 2, "works": "no"}]')],
)  # fmt: skip
def test_a_cache_of_any_content_is_ignored_and_replaced(content: bytes, tmp_path: Path) -> None:
    cache = P2PCache(str(tmp_path), HostFacts("h", "b"), "1")
    cache.path.write_bytes(content)
    assert cache.read() == {}
    cache.add({("a", "b"): PairResult(None)}, [])
    assert cache.read() == {("a", "b"): PairResult(None)}


@pytest.mark.parametrize("kind", ["directory", "fifo"])
def test_a_cache_that_is_no_file_does_not_block(kind: str, tmp_path: Path) -> None:
    cache = P2PCache(str(tmp_path), HostFacts("h", "b"), "1")
    for path in (cache.path, cache.path.with_suffix(".lock")):
        path.mkdir() if kind == "directory" else os.mkfifo(path)
    assert cache.read() == {}
    cache.add({("a", "b"): PairResult(None)}, [])
