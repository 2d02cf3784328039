"""Waits on the host side: they hear signals, tell late from dead, and end with the deadline."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist

from communicators import Group, Settings
from tests.harness import Rank, Ranks, run_fresh

SOON_S = 2.0
PREFIX = "import os, signal, sys, time, threading\n"


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
    started = time.monotonic()
    try:
        _wait(group, kind)
    except Exception as error:  # noqa: BLE001
        return type(error).__name__, str(error), time.monotonic() - started
    return "nothing", "", 0.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("met", [True, False])
def test_a_killed_peer_is_dead_at_once(kind: str, met: bool) -> None:
    outcomes = run_fresh(3, _lose_rank_1, kind, met, f"killed-{kind}")
    assert outcomes[1].killed
    for outcome in (outcomes[0], outcomes[2]):
        name, text, seconds = outcome.value
        assert name == "PeerDiedError", (name, text)
        assert "rank 1 (pid " in text and seconds < 0.5 + SOON_S, text


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
    started = time.monotonic()
    try:
        group.barrier()
    except Exception as error:  # noqa: BLE001
        return type(error).__name__, str(error), time.monotonic() - started
    return "nothing", "", 0.0


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
