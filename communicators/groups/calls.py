"""Calls that may block without limit, made on a thread so that their caller can leave.

torch's stores and its rendezvous wait inside C++, where neither a signal handler nor a deadline of
ours is heard, and a store whose host is stopped never answers. So a `Call` runs on a worker thread,
and the caller waits in poll(2), beside whatever else it wants to hear of: about 10 us per call.

A thread that comes back from C++ while the interpreter ends aborts the process (up to Python 3.13
it is unwound through frames of C++ that allow no exceptions). So at exit the threads are waited
for a moment, and those that are inside a wait then are made to sleep for good.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import queue
import select
import signal
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import CommunicatorError
from . import forks

_EXIT_S = 0.2  # how long the process's exit waits for calls that are under way
_LONGEST_S = 1e6  # poll(2) takes milliseconds in an int


class _Worker:
    """A thread and the eventfd by which it says that its call is done."""

    def __init__(self) -> None:
        self.calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.poll = select.poll()
        self.poll.register(self.fd, select.POLLIN)
        self.call: Call | None = None
        self.thread = threading.Thread(target=self._body, daemon=True, name="communicators call")
        self.thread.start()

    def _body(self) -> None:
        while (call := self.calls.get()) is not None:
            try:
                call.value = call.function(call)
            except BaseException as error:  # noqa: BLE001  (raised again by the caller)
                call.error = error
            call.function = None  # it may hold a store
            with _lock:
                call.done = True
                if call.left:
                    _give_back(self)
                else:
                    os.eventfd_write(self.fd, 1)
            del call


_lock = threading.Lock()
_idle: list[_Worker] = []
_workers: set[_Worker] = set()
_ended = False


def _give_back(worker: _Worker) -> None:
    worker.call = None
    _idle.append(worker)


class Call:
    """`function(self)` on a thread. Use it as a context manager: leaving the block leaves the call.

    Attributes:
        done: it has returned or raised.
        left: nobody waits any more; the function may look at this.
        wake: set by the function: ends the wait that it is in, from another thread.
    """

    def __init__(self, function: Callable[[Call], Any]) -> None:
        self.function: Any = function
        self.value: Any = None
        self.error: BaseException | None = None
        self.done = self.left = False
        self.wake: Callable[[], None] | None = None
        while _ended and threading.current_thread().daemon:
            time.sleep(1)  # it ends with the process, and says nothing
        with _lock:
            if _ended:
                raise CommunicatorError("the process ends: nothing can be waited for any more")
            self._worker = _idle.pop() if _idle else _Worker()
            _workers.add(self._worker)
            self._worker.call = self
        self._worker.calls.put(self)

    def poll(self, seconds: float, others: Iterable[int] = ()) -> set[int]:
        """Waits until it is done or one of the descriptors `others` is ready, which are returned.

        Signal handlers run meanwhile, and what they raise comes out.
        """
        poller, others = self._worker.poll, tuple(others)
        if others:
            poller = select.poll()
            for descriptor in (self._worker.fd, *others):
                poller.register(descriptor, select.POLLIN)
        ready = poller.poll(max(0.0, min(seconds, _LONGEST_S)) * 1000)
        return {descriptor for descriptor, _ in ready if descriptor != self._worker.fd}

    def result(self) -> Any:
        """What the function returned; raises what it raised. Only once it is done."""
        if self.error is not None:
            raise self.error
        return self.value

    def leave(self) -> None:
        """Nobody waits for it any more. Idempotent."""
        with _lock:
            if self.left:
                return
            self.left = True
            wake = self.wake
            if self.done:
                os.eventfd_read(self._worker.fd)
                _give_back(self._worker)
                return
        if wake is not None:
            wake()

    def __enter__(self) -> Call:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()


def attend(function: Callable[[], Any], seconds: float) -> Any:
    """function()'s value, unless it takes longer: then TimeoutError, and it goes on by itself."""
    with Call(lambda _: function()) as call:
        end = time.monotonic() + seconds
        while not call.done:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError
            call.poll(left)
        return call.result()


@atexit.register
def _end() -> None:
    global _ended
    with _lock:
        _ended = True
    for worker in _workers:
        worker.calls.put(None)
    until = time.monotonic() + _EXIT_S
    for worker in _workers:
        worker.thread.join(max(0.0, until - time.monotonic()))
    stuck = [worker.thread.ident for worker in _workers if worker.thread.is_alive()]
    if stuck:
        _put_to_sleep(stuck)


def _put_to_sleep(threads: Iterable[int | None]) -> None:
    """Makes threads that are inside a system call stay there until the process has ended.

    pause(2) is the handler of a signal that is sent to each. Python's own handlers would return.
    """
    library = ctypes.CDLL(None)
    library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    library.signal.restype = ctypes.c_void_p
    library.signal(signal.SIGRTMAX, ctypes.cast(library.pause, ctypes.c_void_p))
    for thread in threads:
        if thread is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pthread_kill(thread, signal.SIGRTMAX)


def _after_fork() -> None:
    """In the child: the threads are the parent's."""
    global _lock
    _lock = threading.Lock()
    for worker in _workers:
        os.close(worker.fd)
    _idle.clear()
    _workers.clear()


forks.call_in_child(_after_fork)
