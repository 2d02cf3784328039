"""What may happen to a rank while it waits in CPU shared memory: signals, threads, exits."""

from __future__ import annotations

import os
import re
import signal
import threading
import time

import pytest
import torch

from communicators import CommunicatorError
from tests.faults.test_shm_faults import opened
from tests.ranks import Rank, run_fresh


def two_threads(rank: Rank) -> list[str]:
    cpu = opened(rank, timeout_s=10.0)
    if rank.rank == 1:
        time.sleep(0.5)
        cpu.barrier()
        return []
    errors: list[str] = []
    waiting = threading.Thread(target=cpu.barrier)
    waiting.start()
    time.sleep(0.2)  # the barrier waits for rank 1
    try:
        cpu.all_reduce_(torch.ones(3))
    except CommunicatorError as error:
        errors.append(str(error))
    waiting.join()
    return errors


def test_a_second_thread_is_an_error_and_does_no_harm() -> None:
    first, second = run_fresh(2, two_threads)
    assert first.value and "a second thread called" in first.value[0], first
    assert second.error == ""


class Stop(Exception):
    """What a signal handler raises."""


def interrupted(rank: Rank, raises: bool) -> str:
    cpu = opened(rank, timeout_s=20.0)
    seen: list[int] = []

    def handler(number: int, frame: object) -> None:
        seen.append(number)
        if raises:
            raise Stop("by the handler")

    signal.signal(signal.SIGTERM, handler)
    cpu.barrier()
    if rank.rank == 1:
        os.kill(rank.group("pids").gather_objects("pid", os.getpid())[0], 0)
        time.sleep(1.0)
        cpu.barrier()
        return ""
    me = os.getpid()
    rank.group("pids").gather_objects("pid", me)
    threading.Timer(0.3, os.kill, (me, signal.SIGTERM)).start()
    started = time.monotonic()
    try:
        cpu.barrier()
    except Stop as stop:
        assert time.monotonic() - started < 0.9
        with pytest.raises(CommunicatorError, match="interrupted by a signal handler"):
            cpu.barrier()
        return str(stop)
    assert seen == [signal.SIGTERM]
    return "finished"


def test_a_signal_handler_runs_while_a_rank_waits() -> None:
    first, second = run_fresh(2, interrupted, False)
    assert first.value == "finished" and not second.error, (first, second)


def test_what_a_signal_handler_raises_ends_the_wait() -> None:
    first, second = run_fresh(2, interrupted, True)
    assert first.value == "by the handler", first
    assert second.error == "CommunicatorError", second
    assert "rank 0 was interrupted by a signal handler" in second.message


def one_closes(rank: Rank) -> None:
    cpu = opened(rank, timeout_s=20.0)
    cpu.barrier()
    if rank.rank == 1:
        cpu.close()
        time.sleep(1)
    else:
        cpu.barrier()


def test_a_peer_that_closed_is_not_waited_for() -> None:
    outcomes = run_fresh(2, one_closes)
    assert outcomes[0].error == "PeerDiedError"
    assert re.search(r"rank 1 \(pid \d+\) closed the group", outcomes[0].message)


def last_call_then_exit(rank: Rank) -> float:
    """A rank may leave as soon as its own part is done."""
    cpu = opened(rank)
    if rank.rank == 0:
        cpu.broadcast(torch.full((100,), 7.0), 0)
        cpu.send_tensor_list([torch.full((100,), 8.0)], 1)
        cpu.close()
        return 0.0
    time.sleep(0.3)
    x = cpu.broadcast(torch.zeros(100), 0)
    if rank.rank == 1:
        x += cpu.recv_tensor_list(0)[0]
    return float(x[0])


def test_what_a_rank_sent_outlives_it() -> None:
    assert [o.value for o in run_fresh(3, last_call_then_exit)] == [0.0, 15.0, 7.0]


def cost_of_waiting(rank: Rank) -> float:
    """Share of a core that the rank used while it waited two seconds for the other."""
    cpu = opened(rank, timeout_s=30.0)
    cpu.barrier()
    if rank.rank == 1:
        time.sleep(2.0)
    started, used = time.monotonic(), time.process_time()
    cpu.barrier()
    return (time.process_time() - used) / (time.monotonic() - started)


def test_a_waiting_rank_sleeps() -> None:
    share = run_fresh(2, cost_of_waiting)[0].value
    assert share < 0.02, f"{share:.2%} of a core"
