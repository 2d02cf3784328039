"""Work: what a call of a torch process group returns; and the thread that runs the calls."""

from __future__ import annotations

import datetime
import queue
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch._C._distributed_c10d import Work as TorchWork

from ..errors import CommTimeoutError


class Work(TorchWork):
    """A call in progress, or done.

    wait() raises what the call raised: CommTimeoutError, PeerDiedError, CommMismatchError and the
    others of communicators.errors.
    """

    def __init__(self, name: str, call: Callable[[], None] | None, results: list[Any]) -> None:
        super().__init__()
        self._name = name
        self._call = call
        self._results = results
        self._error: BaseException | None = None
        self._done = threading.Event() if call is not None else None
        self._lock = threading.Lock()
        self._future: torch.futures.Future[Any] | None = None

    def run(self) -> None:
        """On the group's thread."""
        assert self._call is not None and self._done is not None
        try:
            self._call()
        except BaseException as error:  # noqa: BLE001  (wait() raises it)
            self._error = error
        self._call = None  # lets go of the tensors that it reads
        with self._lock:
            self._done.set()
            future = self._future
        if future is not None:
            self._settle(future)

    def _settle(self, future: torch.futures.Future[Any]) -> None:
        if isinstance(self._error, Exception):
            future.set_exception(self._error)
        else:
            future.set_result(self._results)

    def wait(self, timeout: datetime.timedelta = datetime.timedelta(0)) -> bool:
        """Returns True once it is done; CommTimeoutError after `timeout`, if one is given."""
        if self._done is not None:
            seconds = timeout.total_seconds()
            if not self._done.wait(seconds if seconds > 0 else None):
                raise CommTimeoutError(f"{self._name}: not done {seconds:g} s after wait() began")
        if self._error is not None:
            raise self._error
        return True

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return self._done is None or self._done.is_set()

    def is_success(self) -> bool:
        return self.is_completed() and self._error is None

    def exception(self) -> BaseException | None:
        return self._error

    def result(self) -> list[Any]:
        self.wait()
        return self._results

    def get_future(self) -> torch.futures.Future[Any]:
        """Of the list of result tensors; settled on the group's thread."""
        with self._lock:
            done = self._future is None and self.is_completed()
            if self._future is None:
                self._future = torch.futures.Future()
        if done:
            self._settle(self._future)
        return self._future


class Worker:
    """Runs the calls of one group in the order in which they were made, on a thread of its own.

    So calls on two groups in different orders on different ranks do not wait for each other. A call
    that its caller waits for at once is made on the caller's thread where nothing is before it:
    a thread would cost more than a small collective takes.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._works: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._last: Work | None = None

    def call(self, name: str, call: Callable[[], None], results: list[Any], later: bool) -> Work:
        """Makes the call, now or `later`, after those that are under way."""
        last = self._last
        if not later and (last is None or last.is_completed()):
            call()
            return Work(name, None, results)
        work = self._last = Work(name, call, results)
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, daemon=True, name=f"communicators {self._name}"
            )
            self._thread.start()
        self._works.put(work)
        return work

    def drain(self) -> None:
        """Returns when all that was called is done."""
        if self._last is not None and self._last._done is not None:
            self._last._done.wait()

    def close(self) -> None:
        """Ends the thread after what was called. Idempotent."""
        if self._thread is not None:
            self._works.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (work := self._works.get()) is not None:
            work.run()
            del work
