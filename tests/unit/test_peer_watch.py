"""peer_watch.py with real processes that end."""

from __future__ import annotations

import dataclasses
import os
import queue
import subprocess
import threading
from typing import Any

from communicators.backends.nccl.peer_watch import PeerWatch, own_process, watchable


def test_the_end_of_a_process_is_reported_once_and_at_once() -> None:
    reports: Any = queue.Queue()
    with subprocess.Popen(["sleep", "60"]) as first, subprocess.Popen(["sleep", "60"]) as second:
        watch = PeerWatch(
            {1: first.pid, 2: second.pid}, lambda text, died: reports.put((text, died))
        )
        second.kill()
        assert reports.get(timeout=5) == ("the process of rank 2 is gone", True)
        first.kill()
    watch.stop()
    watch.stop()
    assert reports.empty()


def test_a_process_that_is_gone_already() -> None:
    with subprocess.Popen(["true"]) as ended:
        pass
    reports: Any = queue.Queue()
    watch = PeerWatch({3: ended.pid}, lambda text, died: reports.put((text, died)))
    assert reports.get(timeout=5) == ("the process of rank 3 is gone", True)
    watch.stop()


def test_other_trouble_comes_from_asking() -> None:
    reports: Any = queue.Queue()
    answers = iter(["", "the network is down"])
    PeerWatch({}, lambda text, died: reports.put((text, died)), lambda: next(answers))
    assert reports.get(timeout=10) == ("the network is down", False)


def test_stop_ends_the_thread_and_leaves_no_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    with subprocess.Popen(["sleep", "60"]) as peer:
        watch = PeerWatch({1: peer.pid}, lambda text, died: None)
        assert threading.active_count() == before[1] + 1
        watch.stop()
        peer.kill()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_stop_from_within_the_report() -> None:
    done = threading.Event()
    box: list[PeerWatch] = []
    ready = threading.Event()

    def report(text: str, died: bool) -> None:
        ready.wait(5)
        box[0].stop()
        done.set()

    with subprocess.Popen(["true"]) as ended:
        pass
    box.append(PeerWatch({1: ended.pid}, report))
    ready.set()
    assert done.wait(5)


def test_only_peers_of_this_host_and_namespace_are_watched() -> None:
    own = own_process()
    processes = {
        0: own,
        1: dataclasses.replace(own, pid=own.pid + 1),
        2: dataclasses.replace(own, pid=7, boot_id="another host"),
        3: dataclasses.replace(own, pid=7, namespace="pid:[1]"),
    }
    assert watchable(processes) == {1: own.pid + 1}
