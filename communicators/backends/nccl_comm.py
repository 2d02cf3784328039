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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..base import OPS
from ..bindings.pynccl_wrapper import (
    NcclError,
    NCCLLibrary,
    ncclDataTypeEnum,
    ncclRedOpTypeEnum,
)
from ..errors import (
    CommTimeoutError,
    CommunicatorError,
    InvalidArgumentError,
    NativeLibraryError,
    RefusedError,
)

_log = logging.getLogger(__name__)

_GRAPH_S = 1.0  # for ncclCommDestroy, where graphs may keep it from returning
_SUM = int(ncclRedOpTypeEnum.ncclSum)
_BYTE = int(ncclDataTypeEnum.ncclUint8)  # data that is only moved has no other type


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
        self.captured = False  # graphs may hold operations of it
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

    @contextlib.contextmanager
    def failures(self, op: str) -> Iterator[None]:
        """Within: an NCCL error gets the op and the rank, and ends the communicator."""
        try:
            yield
        except NcclError as error:
            self.broken = f"{op} failed: {error}"
            raise NcclError(f"{op} on rank {self.rank}: {error}", error.code) from error

    @contextlib.contextmanager
    def grouped(self) -> Iterator[None]:
        """Within: operations are started together, so none waits for a later one."""
        self.nccl.ncclGroupStart()
        try:
            yield
        finally:
            self.nccl.ncclGroupEnd()

    def enqueue(
        self,
        op: str,
        out: torch.Tensor | None,
        inp: torch.Tensor | None,
        root: int,
        stream: Any,
        reduction: int = _SUM,
    ) -> None:
        """One collective of base.OPS on contiguous tensors of fitting sizes, on a raw stream."""
        nccl, comm = self.nccl, self.handle
        source, sent = (0, 0) if inp is None else (inp.data_ptr(), inp.nbytes)
        target, received = (0, 0) if out is None else (out.data_ptr(), out.nbytes)
        self._note_capture()
        with self.failures(op):
            if op == "all_reduce" and inp is not None:
                dtype = ncclDataTypeEnum.from_torch(inp.dtype)
                nccl.ncclAllReduce(source, target, inp.numel(), dtype, reduction, comm, stream)
            elif op == "reduce_scatter" and out is not None:
                dtype = ncclDataTypeEnum.from_torch(out.dtype)
                nccl.ncclReduceScatter(source, target, out.numel(), dtype, reduction, comm, stream)
            elif op == "all_gather":
                nccl.ncclAllGather(source, target, sent, _BYTE, comm, stream)
            elif op == "gather":
                with self.grouped():
                    nccl.ncclSend(source, sent, _BYTE, root, comm, stream)
                    for peer in range(self.world_size if self.rank == root else 0):
                        at = target + peer * sent
                        nccl.ncclRecv(at, sent, _BYTE, peer, comm, stream)
            elif op == "broadcast":
                nccl.ncclBroadcast(target, target, received, _BYTE, root, comm, stream)
            elif op == "send":
                nccl.ncclSend(source, sent, _BYTE, root, comm, stream)
            elif op == "recv":
                nccl.ncclRecv(target, received, _BYTE, root, comm, stream)
            else:
                raise InvalidArgumentError(f"{op!r} is not one of {', '.join(OPS)}")

    def _note_capture(self) -> None:
        if not self.captured and self.device.type == "cuda":
            self.captured = torch.cuda.is_current_stream_capturing()

    def all_gather_ragged(
        self, parts: Sequence[torch.Tensor], inp: torch.Tensor, stream: Any
    ) -> None:
        """Rank r's `inp` into `parts[r]` of every rank: a broadcast from each."""
        nccl, comm, source = self.nccl, self.handle, inp.data_ptr()
        self._note_capture()
        with self.failures("all_gather"), self.grouped():
            for root, part in enumerate(parts):
                nccl.ncclBroadcast(source, part.data_ptr(), part.nbytes, _BYTE, root, comm, stream)

    def reduce_scatter_ragged(
        self, out: torch.Tensor, parts: Sequence[torch.Tensor], stream: Any, reduction: int
    ) -> None:
        """The sum of the ranks' `parts[r]` into rank r's `out`: a reduction to each."""
        nccl, comm, target = self.nccl, self.handle, out.data_ptr()
        self._note_capture()
        dtype = ncclDataTypeEnum.from_torch(out.dtype)
        with self.failures("reduce_scatter"), self.grouped():
            for root, part in enumerate(parts):
                nccl.ncclReduce(
                    part.data_ptr(), target, part.numel(), dtype, reduction, root, comm, stream
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
        """Waits up to `limit_s` for this rank's work, then destroys; aborts what does not end.

        NCCL keeps a communicator while a CUDA graph holds operations of it. Then this returns, and
        the communicator goes, on a thread of its own, with the last such graph.
        """
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
        except (CommunicatorError, RuntimeError) as error:  # RuntimeError: torch's CUDA errors
            _log.warning("NCCL on rank %d is aborted at its end: %s", self.rank, error)
            self.abort(f"it did not end by itself: {error}")
            return
        self.handle = None
        patience = min(limit_s, _GRAPH_S) if self.captured else limit_s
        try:
            bounded(lambda: self.nccl.ncclCommDestroy(handle), patience, "ncclCommDestroy")
        except CommTimeoutError:
            if self.captured:
                return
            self.handle = handle
            self.abort("ncclCommDestroy did not return")
        except NcclError as error:
            _log.warning("NCCL on rank %d was not destroyed: %s", self.rank, error)
