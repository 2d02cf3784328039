"""One NCCL communicator from opening to its end, with a deadline on everything that may block.

NCCL's blocking calls know no deadline, and its non-blocking mode starts every operation on a thread
of its own, which is slow and cannot be captured. So the communicator is a blocking one, and the
calls that wait for peers run on a helper thread that can be given up.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from ..bindings.pynccl_wrapper import NcclError, NCCLLibrary
from ..errors import CommTimeoutError, CommunicatorError, NativeLibraryError, RefusedError

_log = logging.getLogger(__name__)


def bounded(call: Callable[[], Any], limit_s: float, what: str) -> Any:
    """call() on a thread of its own, given up with CommTimeoutError past `limit_s` seconds."""
    outcome: list[Any] = []

    def body() -> None:
        try:
            outcome.append((call(), None))
        except Exception as error:  # noqa: BLE001  (raised again by the caller)
            outcome.append((None, error))

    thread = threading.Thread(target=body, daemon=True, name=what)
    thread.start()
    thread.join(limit_s)
    if not outcome:
        raise CommTimeoutError(f"{what} did not return within {limit_s:g} s")
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


class NcclComm:
    """This rank's end of an NCCL communicator.

    Args:
        unique_id: the id that rank 0 made, as bytes.
        limit_s: seconds that the peers have to arrive.

    Collective. Attributes:
        handle: NCCL's ncclComm_t; None once it ended.
        broken: why it is unusable, "" while it is not.
        windows: registered address -> window.
    """

    def __init__(
        self,
        nccl: NCCLLibrary,
        unique_id: bytes,
        rank: int,
        world_size: int,
        device: torch.device,
        limit_s: float,
    ) -> None:
        self.nccl = nccl
        self.rank, self.world_size = rank, world_size
        self.device = device
        self.broken = ""
        self.windows: dict[int, Any] = {}
        meeting = nccl.unique_id_from_bytes(unique_id)

        def init() -> Any:
            with contextlib.ExitStack() as stack:
                if device.type == "cuda":
                    stack.enter_context(torch.cuda.device(device))
                return nccl.ncclCommInitRank(world_size, meeting, rank)

        self.handle: Any = bounded(init, limit_s, f"ncclCommInitRank on rank {rank}")

    def require_usable(self) -> None:
        """RefusedError once it has failed or ended."""
        if self.handle is None or self.broken:
            raise RefusedError(
                f"NCCL on rank {self.rank} is unusable: {self.broken or 'it was destroyed'}"
            )

    def check(self) -> None:
        """NcclError, after an abort, when NCCL has found a failure in the background."""
        if self.handle is None or not self.nccl.has("ncclCommGetAsyncError"):
            return
        try:
            state = self.nccl.ncclCommGetAsyncError(self.handle)
            self.nccl.NCCL_CHECK(state, f"NCCL on rank {self.rank}")
        except NcclError as error:
            self.abort(str(error))
            raise

    def wait(self, limit_s: float) -> None:
        """Waits for what is enqueued on the current stream; aborts past `limit_s` seconds.

        Raises CommTimeoutError then, and NcclError when NCCL reports a failure.
        """
        if self.device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        deadline = time.monotonic() + limit_s
        while not event.query():
            self.check()
            if time.monotonic() > deadline:
                self.abort(f"a peer did not take part within {limit_s:g} s")
                raise CommTimeoutError(
                    f"NCCL on rank {self.rank} of {self.world_size} waited {limit_s:g} s for its "
                    "peers, and was aborted"
                )
            time.sleep(0.0005)

    def register(self, address: int, nbytes: int) -> Any:
        """A window over memory of ncclMemAlloc; collective, with as many bytes on every rank."""
        self.require_usable()
        if address not in self.windows:
            self.windows[address] = self.nccl.ncclCommWindowRegister(self.handle, address, nbytes)
        return self.windows[address]

    def deregister(self, window: Any) -> None:
        """Ends a window; the memory stays."""
        self.require_usable()
        self.nccl.ncclCommWindowDeregister(self.handle, window)
        self.windows = {ptr: one for ptr, one in self.windows.items() if one is not window}

    def abort(self, reason: str, limit_s: float = 30.0) -> None:
        """Ends what is running, also when peers are gone, and frees the communicator."""
        handle, self.handle = self.handle, None
        self.broken = self.broken or reason
        self.windows.clear()  # they end with the communicator
        if handle is None:
            return
        try:
            bounded(lambda: self.nccl.ncclCommAbort(handle), limit_s, "ncclCommAbort")
        except (CommTimeoutError, NcclError, NativeLibraryError) as error:
            _log.warning("NCCL on rank %d could not be aborted: %s", self.rank, error)

    def destroy(self, limit_s: float) -> None:
        """Waits up to `limit_s` for this rank's work, then destroys; aborts what does not end."""
        if self.handle is None:
            return
        if self.broken:
            self.abort(self.broken)
            return
        handle = self.handle
        try:
            if self.device.type == "cuda":
                bounded(lambda: torch.cuda.synchronize(self.device), limit_s, "the last work")
            for window in list(self.windows.values()):
                self.deregister(window)
            bounded(lambda: self.nccl.ncclCommDestroy(handle), limit_s, "ncclCommDestroy")
            self.handle = None
        except (CommunicatorError, RuntimeError) as error:  # RuntimeError: torch's CUDA errors
            _log.warning("NCCL on rank %d is aborted at its end: %s", self.rank, error)
            self.abort(f"it did not end by itself: {error}")
