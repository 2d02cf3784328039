"""Notices that a peer's process is gone, at once and without any cost to the collectives.

A kernel that waits for a dead peer never ends, and neither does whoever waits for the kernel. The
kernel of the operating system knows when a process ends: a pidfd becomes readable (pidfd_open(2)),
whatever the reason, also SIGKILL. Peers on other hosts are beyond it; NCCL's own error reports
serve for those.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...groups.hosts import boot_id, namespace

_log = logging.getLogger(__name__)
_PERIOD_S = 0.5  # between two questions to NCCL


@dataclass(frozen=True)
class ProcessId:
    """A process, and where its number means anything."""

    boot_id: str
    namespace: str
    pid: int


def own_process() -> ProcessId:
    """This process, to be told to the peers."""
    return ProcessId(boot_id(), namespace("pid"), os.getpid())


def watchable(processes: Mapping[int, ProcessId]) -> dict[int, int]:
    """rank -> pid of the peers among `processes` (rank -> process) that can be seen from here."""
    own = own_process()
    return {
        rank: one.pid
        for rank, one in processes.items()
        if own.namespace  # else pids may mean something else to the peer
        and (one.boot_id, one.namespace) == (own.boot_id, own.namespace)
        and one.pid != own.pid
    }


class PeerWatch:
    """A thread that reports the first trouble with a peer, once, and ends.

    Args:
        pids: rank -> pid of the peers on this host.
        on_trouble: called, on the thread, with a sentence; `died` says that a process is gone.
        ask: called every half second; a sentence when something is wrong, else "".
    """

    def __init__(
        self,
        pids: Mapping[int, int],
        on_trouble: Callable[[str, bool], None],
        ask: Callable[[], str] = lambda: "",
    ) -> None:
        self._on_trouble, self._ask = on_trouble, ask
        self._woken, self._wake = os.pipe()
        self._descriptors: dict[int, str] = {}
        gone = ""
        for rank, pid in pids.items() if hasattr(os, "pidfd_open") else ():
            try:
                self._descriptors[os.pidfd_open(pid)] = f"the process of rank {rank} is gone"
            except ProcessLookupError:
                gone = f"the process of rank {rank} is gone"
            except OSError as error:  # a kernel before 5.3, or a sandbox that forbids it
                _log.info("rank %d is not watched: %s", rank, error)
        self._thread = threading.Thread(
            target=self._body, args=(gone,), daemon=True, name="communicators peer watch"
        )
        self._thread.start()

    def _body(self, gone: str) -> None:
        try:
            trouble, died = (gone, True) if gone else self._until_trouble()
        finally:
            for descriptor in (self._woken, *self._descriptors):
                os.close(descriptor)
        if trouble:
            self._on_trouble(trouble, died)

    def _until_trouble(self) -> tuple[str, bool]:
        poller = select.poll()
        for descriptor in (self._woken, *self._descriptors):
            poller.register(descriptor, select.POLLIN)
        while True:
            ready = [descriptor for descriptor, _ in poller.poll(_PERIOD_S * 1000)]
            if self._woken in ready:
                return "", False
            if ready:
                return self._descriptors[ready[0]], True
            answer = self._ask()
            if answer:
                return answer, False

    def stop(self) -> None:
        """Ends the thread and waits for what it does; idempotent; on_trouble may call it."""
        wake, self._wake = self._wake, -1
        if wake >= 0:
            with contextlib.suppress(BrokenPipeError):  # the thread has ended by itself
                os.write(wake, b"x")
            os.close(wake)
        if threading.current_thread() is not self._thread:
            self._thread.join(5)
