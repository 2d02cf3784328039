"""Another process of this host: who it is, and whether it still runs.

A pidfd names one process for good, where a pid may be given to another process later; with the
start time from /proc a pid that came over a message is checked before it is trusted.
"""

from __future__ import annotations

import functools
import os
import secrets
import select
from pathlib import Path

from ..groups.hosts import boot_id, namespace


def proc_problem() -> str | None:
    """Why the processes of this pid namespace cannot be looked up under /proc; None if they can."""
    try:
        myself = os.readlink("/proc/self")
    except OSError as error:
        return f"this process has no /proc ({error.strerror})"
    if myself != str(os.getpid()):
        return "the /proc that this process sees is that of another pid namespace"
    return None


def start_time(pid: int) -> int | None:
    """When `pid` started, in clock ticks since boot (proc_pid_stat(5), field 22); None if gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, NotADirectoryError, ProcessLookupError):
        return None
    return int(stat.rpartition(")")[2].split()[19])  # the name before ")" may hold anything


def pid_space() -> str:
    """Equal in two processes if and only if each can find the other under /proc, by its pid."""
    where = namespace("pid")
    if proc_problem() is not None or not where:
        return f"{_process_token()}/{os.getpid()}"
    return f"{boot_id()}/{where}"


@functools.cache
def _process_token() -> str:
    return secrets.token_hex(16)


class Process:
    """A process that is watched. `gone` is True once it has ended, also as a zombie."""

    def __init__(self, pid: int, started: int) -> None:
        self.pid = pid
        self._fd: int | None = None
        try:
            self._fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        if start_time(pid) != started:  # that pid is another process by now
            self.close()
            return
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)

    @property
    def fd(self) -> int:
        """The pidfd, for poll(2): readable once the process has ended. -1: it had ended before."""
        return -1 if self._fd is None else self._fd

    @property
    def gone(self) -> bool:
        """Whether the process has ended. A system call, about 1 us."""
        return self._fd is None or bool(self._poll.poll(0))

    def close(self) -> None:
        """Gives the descriptor back; afterwards `gone` is True."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
