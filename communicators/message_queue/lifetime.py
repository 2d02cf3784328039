"""One end of a queue as an object of one process: its lock, its end, forks, the process's exit."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ..errors import CommTimeoutError, QueueClosedError, RefusedError
from .deadline import Deadline

_Self = TypeVar("_Self", bound="QueueEnd")
_CLOSE_S = 1.0  # how long close() waits for a thread that is inside a call


class QueueEnd:
    """What MessageQueue is made of besides messages.

    `ends` have cancel(), which wakes a thread inside and makes it raise; announce_close(), which
    tells the other side; and close(), which does that and gives the memory back.
    """

    def _open(self, ends: list[Any], lock: Any, forget: Callable[[], None]) -> None:
        """`lock`: as threading.Lock. After forget() no short call touches the ends' memory."""
        self._ends = ends
        self._closed = False
        self._pid = os.getpid()
        self._forget = forget
        self._set_lock(lock)
        self._finalizer = weakref.finalize(self, _shut, ends, lock, self._pid, forget)
        _queues.add(self)

    def _set_lock(self, lock: Any) -> None:
        self._lock = lock
        self._acquire, self._release = lock.acquire, lock.release

    def close(self) -> None:
        """Leaves the queue and wakes whoever waits for this end. Idempotent, from any thread.

        Readers still get what was sent before, then QueueClosedError. A writer goes on without a
        reader that left.
        """
        if self._closed or self._pid != os.getpid():
            return
        self._closed = True
        self._finalizer.detach()
        _shut(self._ends, self._lock, self._pid, self._forget)

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _locked(self, deadline: Deadline) -> Iterator[Deadline]:
        if not self._lock.acquire(False):
            self._wait_for_lock(deadline)
        try:
            self._check_usable()
            yield deadline
        finally:
            self._lock.release()

    def _wait_for_lock(self, deadline: Deadline) -> None:
        if not self._lock.acquire(timeout=min(deadline.left(), threading.TIMEOUT_MAX)):
            raise CommTimeoutError(
                f"message queue: another thread of this process has been in this end for "
                f"{deadline.seconds:g} s; threads take turns"
            )

    def _check_usable(self) -> None:
        if self._closed:
            raise QueueClosedError("message queue: this end was closed")
        if self._pid != os.getpid():
            raise RefusedError(
                f"message queue: this end belongs to process {self._pid}, and this is its child "
                f"{os.getpid()}; a child joins with export_handle() and create_from_handle()"
            )

    def _after_fork(self) -> None:
        """In the child: the parent's lock may be held for ever, and its ring is not ours."""
        self._set_lock(threading.Lock())
        self._forget()


def _shut(ends: list[Any], lock: Any, pid: int, forget: Callable[[], None]) -> None:
    """Closes the ends, once no thread is inside. Also runs when the queue is collected, at exit."""
    if os.getpid() != pid:
        return
    forget()
    for end in ends:
        end.cancel()
    if not lock.acquire(timeout=_CLOSE_S):
        # A thread is busy in there (or this is its signal handler): the other side is told, and
        # the memory stays until the process ends.
        for end in ends:
            end.announce_close()
        return
    try:
        for end in ends:
            end.close()
    finally:
        lock.release()


_queues: weakref.WeakSet[QueueEnd] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for queue in list(_queues):
        queue._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
