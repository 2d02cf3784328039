"""One NCCL communicator from opening to its end, with a deadline on everything that may block.

NCCL's blocking calls know no deadline, and its non-blocking mode starts every operation on a thread
of its own, which is slow and cannot be captured. So the communicator is a blocking one, and the
calls that wait for peers run on a helper thread that can be given up. Once open, a thread watches
the peers (peer_watch.py) and aborts the communicator when one is gone, so that nobody waits for
ever; operations and that abort exclude each other by a lock.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ...base import OPS, Splits
from ...bindings.pynccl_wrapper import NcclError, NCCLLibrary, ncclDataTypeEnum, ncclRedOpTypeEnum
from ...errors import (
    CommTimeoutError,
    CommunicatorError,
    InvalidArgumentError,
    NativeLibraryError,
    PeerDiedError,
    RefusedError,
)
from .peer_watch import PeerWatch

_log = logging.getLogger(__name__)

_STUCK_S = 5.0  # after which an operation is taken to hang
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
        self.lost_peer = False  # it is broken because a peer's process is gone
        self._watch: PeerWatch | None = None
        self._lock = threading.RLock()  # between operations and an abort by the watch
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
        """RefusedError once it has failed or ended, PeerDiedError when a peer's end was why."""
        if self.handle is None or self.broken:
            kind = PeerDiedError if self.lost_peer else RefusedError
            raise kind(f"NCCL on rank {self.rank} is unusable: {self.broken or 'it was destroyed'}")

    def watch(self, pids: Mapping[int, int]) -> None:
        """From now on aborts when a peer (rank -> pid) ends or NCCL reports a failure."""

        def trouble(reason: str, died: bool) -> None:
            _log.error("NCCL on rank %d is aborted: %s", self.rank, reason)
            self.lost_peer = died
            self.broken = self.broken or reason
            # An operation that is stuck on that peer would keep the lock for ever.
            locked = self._lock.acquire(timeout=_STUCK_S)
            try:
                self.abort(reason)
            finally:
                if locked:
                    self._lock.release()

        self._watch = PeerWatch(pids, trouble, lambda: str(self._background_failure() or ""))

    def _background_failure(self) -> NcclError | None:
        if not self.nccl.has("ncclCommGetAsyncError"):
            return None
        if not self._lock.acquire(blocking=False):
            return None  # an operation is being started; it reports for itself
        try:
            if self.handle is not None:
                state = self.nccl.ncclCommGetAsyncError(self.handle)
                self.nccl.NCCL_CHECK(state, f"NCCL on rank {self.rank}")
        except NcclError as error:
            return error
        finally:
            self._lock.release()
        return None

    @contextlib.contextmanager
    def operation(self, op: str) -> Iterator[Any]:
        """Within: the handle, which is not aborted meanwhile.

        An NCCL error gets the op and the rank, and ends the communicator.
        """
        if not self.captured and self.device.type == "cuda":
            self.captured = torch.cuda.is_current_stream_capturing()
        try:
            with self._lock:
                self.require_usable()
                yield self.handle
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
        nccl = self.nccl
        source, sent = (0, 0) if inp is None else (inp.data_ptr(), inp.nbytes)
        target, received = (0, 0) if out is None else (out.data_ptr(), out.nbytes)
        with self.operation(op) as comm:
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
            elif op == "reduce" and inp is not None:
                # Only the root's output is written; the others' is not looked at.
                to, dtype = target or source, ncclDataTypeEnum.from_torch(inp.dtype)
                nccl.ncclReduce(source, to, inp.numel(), dtype, reduction, root, comm, stream)
            elif op == "scatter":
                with self.grouped():
                    for peer in range(self.world_size if self.rank == root else 0):
                        at = source + peer * received
                        nccl.ncclSend(at, received, _BYTE, peer, comm, stream)
                    nccl.ncclRecv(target, received, _BYTE, root, comm, stream)
            elif op == "broadcast":
                nccl.ncclBroadcast(target, target, received, _BYTE, root, comm, stream)
            elif op == "send":
                nccl.ncclSend(source, sent, _BYTE, root, comm, stream)
            elif op == "recv":
                nccl.ncclRecv(target, received, _BYTE, root, comm, stream)
            else:
                raise InvalidArgumentError(f"{op!r} is not one of {', '.join(OPS)}")

    def all_to_all(self, out: torch.Tensor, inp: torch.Tensor, splits: Splits, stream: Any) -> None:
        """Parts of `inp`, of splits[0] elements, to each rank; of splits[1] from each, in `out`."""
        nccl, item = self.nccl, inp.itemsize
        source, target = inp.data_ptr(), out.data_ptr()
        with self.operation("all_to_all") as comm, self.grouped():
            for peer, (sent, received) in enumerate(zip(*splits, strict=True)):
                if sent:
                    nccl.ncclSend(source, sent * item, _BYTE, peer, comm, stream)
                if received:
                    nccl.ncclRecv(target, received * item, _BYTE, peer, comm, stream)
                source, target = source + sent * item, target + received * item

    def all_gather_ragged(
        self, parts: Sequence[torch.Tensor], inp: torch.Tensor, stream: Any
    ) -> None:
        """Rank r's `inp` into `parts[r]` of every rank: a broadcast from each."""
        nccl, source = self.nccl, inp.data_ptr()
        with self.operation("all_gather") as comm, self.grouped():
            for root, part in enumerate(parts):
                nccl.ncclBroadcast(source, part.data_ptr(), part.nbytes, _BYTE, root, comm, stream)

    def reduce_scatter_ragged(
        self, out: torch.Tensor, parts: Sequence[torch.Tensor], stream: Any, reduction: int
    ) -> None:
        """The sum of the ranks' `parts[r]` into rank r's `out`: a reduction to each."""
        nccl, target = self.nccl, out.data_ptr()
        dtype = ncclDataTypeEnum.from_torch(out.dtype)
        with self.operation("reduce_scatter") as comm, self.grouped():
            for root, part in enumerate(parts):
                nccl.ncclReduce(
                    part.data_ptr(), target, part.numel(), dtype, reduction, root, comm, stream
                )

    def check(self) -> None:
        """NcclError, after an abort, when NCCL has found a failure in the background."""
        failure = self._background_failure()
        if failure is not None:
            self.abort(str(failure))
            raise failure

    def wait(self, limit_s: float) -> None:
        """Waits for what is enqueued on the current stream; aborts past `limit_s` seconds.

        Raises CommTimeoutError then, and NcclError when NCCL reports a failure.
        """
        if self.device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        self.require_usable()
        deadline = time.monotonic() + limit_s
        while not event.query():
            self.require_usable()  # the watch may have been faster
            self.check()
            if time.monotonic() > deadline:
                self.abort(f"a peer did not take part within {limit_s:g} s")
                raise CommTimeoutError(
                    f"NCCL on rank {self.rank} of {self.world_size} waited {limit_s:g} s for its "
                    "peers, and was aborted"
                )
            time.sleep(0.0005)
        self.require_usable()  # an abort ends the work too

    def register(self, address: int, nbytes: int) -> Any:
        """A window over memory of ncclMemAlloc; collective, with as many bytes on every rank."""
        with self.operation("register_comm_window") as comm:
            if address not in self.windows:
                self.windows[address] = self.nccl.ncclCommWindowRegister(comm, address, nbytes)
            return self.windows[address]

    def deregister(self, window: Any) -> None:
        """Ends a window; the memory stays."""
        with self.operation("deregister_comm_window") as comm:
            self.nccl.ncclCommWindowDeregister(comm, window)
        self.windows = {ptr: one for ptr, one in self.windows.items() if one is not window}

    def abort(self, reason: str, limit_s: float = 30.0) -> None:
        """Ends what is running, also when peers are gone, and frees the communicator."""
        handle, self.handle = self.handle, None
        self.broken = self.broken or reason
        if self._watch is not None:
            self._watch.stop()
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
        if self._watch is not None:
            self._watch.stop()  # from here on peers end, as they should; its abort is waited for
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
