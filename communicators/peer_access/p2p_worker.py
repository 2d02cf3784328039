"""The two processes of a peer-access probe: one owns the memory, the other reaches for it.

The producer allocates on its GPU, fills it and hands out a CUDA IPC handle. The consumer, on
another GPU, maps the handle, copies the bytes to its own memory and compares them, copies other
bytes back, and the producer compares those. So bytes move in both directions, through the
consumer's GPU: a driver that only claims peer access is found out
(https://github.com/vllm-project/vllm/issues/2728).

p2p.py starts them (`main`), reads what they report and ends them when they do not answer; no
process of the job itself ever waits inside a driver call that may hang.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib
import logging
import os
import queue
import random
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Protocol

from ..bindings.cuda_wrapper import (
    CudaError,
    CudaRTLibrary,
    cudaIpcMemHandle_t,
    find_loaded_library,
)
from ..errors import CommunicatorError, NativeLibraryError

_log = logging.getLogger(__name__)

PROOF_BYTES = 1 << 20
MEASURED_BYTES = 256 << 20
_COPIES = 20  # of the large copies that are timed, after one that is not
_CHAIN_BYTES, _HOPS = 1 << 20, 4096  # of the dependent loads whose latency is measured

# cudaError_t of a GPU that has no room, or no place for another process, at the moment.
_BUSY = {2: "cudaErrorMemoryAllocation", 46: "cudaErrorDevicesUnavailable"}


class Queue(Protocol):
    """What the two sides talk through; multiprocessing.Queue has these two methods."""

    def put(self, obj: Any, /) -> None: ...

    def get(self, *, timeout: float) -> Any: ...


@dataclass(frozen=True)
class Report:
    """What one side found for one pair. `reason` is "" for success.

    transient: it could not be tried, so nothing is known of the pair.
    measured: bandwidths in GB/s (1e9 bytes) and times in microseconds, by name.
    """

    role: str
    index: int
    reason: str = ""
    transient: bool = False
    measured: dict[str, float] = field(default_factory=dict)


def update_environment_variables(envs: Mapping[str, str]) -> None:
    """Sets environment variables of this process, e.g. before CUDA reads them."""
    os.environ.update(envs)


def _pattern(index: int, salt: int, size: int) -> bytes:
    """Bytes that no other pair or direction has, so that stale memory cannot pass for an answer."""
    block = random.Random(index * 2 + salt).randbytes(min(size, PROOF_BYTES))
    return block * (size // len(block))


def _host(data: bytes) -> ctypes.c_void_p:
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p)


def _difference(cuda: CudaRTLibrary, memory: ctypes.c_void_p, expected: bytes) -> str:
    """ "" when device memory begins with `expected`, else how much of it differs."""
    arrived = ctypes.create_string_buffer(len(expected))
    cuda.cudaMemcpy(ctypes.cast(arrived, ctypes.c_void_p), memory, len(expected))
    if arrived.raw == expected:
        return ""
    wrong = sum(a != b for a, b in zip(arrived.raw, expected, strict=True))
    return f"{wrong} of {len(expected)} bytes are wrong"


def _attempt(role: str, index: int, body: Callable[[], dict[str, float]], results: Queue) -> None:
    """Runs one side of one pair and reports its outcome, whatever it is."""
    try:
        report = Report(role, index, measured=body())
    except CudaError as error:
        report = Report(role, index, str(error), transient=error.code in _BUSY)
    except CommunicatorError as error:
        report = Report(role, index, str(error))
    except queue.Empty:
        report = Report(role, index, "the other process of the probe was silent")
    results.put(report)


def producer(
    batch_src: Sequence[int],
    producer_queue: Queue,
    consumer_queue: Queue,
    result_queue: Queue,
    cuda_visible_devices: str | None = None,
    *,
    cuda: CudaRTLibrary | None = None,
    size: int = PROOF_BYTES,
    timeout_s: float = 60.0,
) -> None:
    """Owns memory on each GPU of `batch_src` in turn; see the module's text.

    Args:
        batch_src: CUDA ordinals, one a pair.
        producer_queue: to the consumer; a handle (64 bytes), or None when there is none.
        consumer_queue: from the consumer; anything, once it is done with the pair.
        result_queue: takes one Report a pair.
        cuda_visible_devices: set before CUDA starts, when given.
        size: bytes of the memory, PROOF_BYTES of which are compared.
        timeout_s: how long the consumer is waited for.
    """
    if cuda_visible_devices is not None:
        update_environment_variables({"CUDA_VISIBLE_DEVICES": cuda_visible_devices})
    cuda = cuda or CudaRTLibrary()
    for index, source in enumerate(batch_src):

        def own(index: int = index, source: int = source) -> dict[str, float]:
            handed_out = False
            try:
                cuda.cudaSetDevice(source)
                memory = cuda.cudaMalloc(size)
                mine = _pattern(index, 0, PROOF_BYTES)
                cuda.cudaMemcpy(memory, _host(mine), len(mine))
                cuda.cudaDeviceSynchronize()
                producer_queue.put(bytes(cuda.cudaIpcGetMemHandle(memory)))
                handed_out = True
                reached = consumer_queue.get(timeout=timeout_s)
                if reached:  # else the consumer reports why
                    wrong = _difference(cuda, memory, _pattern(index, 1, PROOF_BYTES))
                    if wrong:
                        raise CommunicatorError(f"of what it wrote, {wrong}")
                cuda.cudaFree(memory)
            finally:
                if not handed_out:
                    producer_queue.put(None)
                    consumer_queue.get(timeout=timeout_s)
            cuda.cudaDeviceReset()
            return {}

        _attempt("producer", index, own, result_queue)


def consumer(
    batch_tgt: Sequence[int],
    producer_queue: Queue,
    consumer_queue: Queue,
    result_queue: Queue,
    cuda_visible_devices: str | None = None,
    *,
    cuda: CudaRTLibrary | None = None,
    size: int = PROOF_BYTES,
    timeout_s: float = 60.0,
) -> None:
    """Reaches from each GPU of `batch_tgt` for the producer's memory; arguments as there.

    With `size` above PROOF_BYTES bandwidth and latency are measured too.
    """
    if cuda_visible_devices is not None:
        update_environment_variables({"CUDA_VISIBLE_DEVICES": cuda_visible_devices})
    cuda = cuda or CudaRTLibrary()
    for index, target in enumerate(batch_tgt):

        def reach(index: int = index, target: int = target) -> dict[str, float]:
            done = False
            handle = producer_queue.get(timeout=timeout_s)
            try:
                if handle is None:
                    return {}  # the producer reports why
                cuda.cudaSetDevice(target)
                local = cuda.cudaMalloc(size)
                theirs = cuda.cudaIpcOpenMemHandle(cudaIpcMemHandle_t.from_buffer_copy(handle))
                measured = _exchange(cuda, index, local, theirs, size)
                cuda.cudaIpcCloseMemHandle(theirs)
                cuda.cudaFree(local)
                done = True
            finally:
                consumer_queue.put(done)
            cuda.cudaDeviceReset()
            return measured

        _attempt("consumer", index, reach, result_queue)


def _exchange(
    cuda: CudaRTLibrary, index: int, local: ctypes.c_void_p, theirs: ctypes.c_void_p, size: int
) -> dict[str, float]:
    """Reads and checks the peer's bytes, measures if `size` asks for it, and writes its own."""
    # By way of memory of its own GPU: a copy straight to the host could be done by the peer.
    cuda.cudaMemset(local, 0, PROOF_BYTES)
    cuda.cudaMemcpy(local, theirs, PROOF_BYTES)
    wrong = _difference(cuda, local, _pattern(index, 0, PROOF_BYTES))
    if wrong:
        raise CommunicatorError(f"of what it read, {wrong}")
    measured = _measure(cuda, local, theirs, size) if size > PROOF_BYTES else {}
    answer = _pattern(index, 1, PROOF_BYTES)
    cuda.cudaMemcpy(local, _host(answer), len(answer))
    cuda.cudaMemcpy(theirs, local, len(answer))
    cuda.cudaDeviceSynchronize()
    return measured


def _measure(
    cuda: CudaRTLibrary, local: ctypes.c_void_p, theirs: ctypes.c_void_p, size: int
) -> dict[str, float]:
    """Copies by the copy engine, one direction at a time, and dependent loads by a kernel.

    GB/s of reading and writing, and the microseconds of one load, where the native library is.
    """

    def milliseconds(to: ctypes.c_void_p, source: ctypes.c_void_p, nbytes: int, n: int) -> float:
        start, end = cuda.cudaEventCreate(), cuda.cudaEventCreate()
        cuda.cudaMemcpyAsync(to, source, nbytes)
        cuda.cudaEventRecord(start)
        for _ in range(n):
            cuda.cudaMemcpyAsync(to, source, nbytes)
        cuda.cudaEventRecord(end)
        cuda.cudaEventSynchronize(end)
        elapsed = cuda.cudaEventElapsedTime(start, end) / n
        cuda.cudaEventDestroy(start)
        cuda.cudaEventDestroy(end)
        return max(elapsed, 1e-9)

    measured = {
        "read_gbps": size / milliseconds(local, theirs, size, _COPIES) / 1e6,
        "write_gbps": size / milliseconds(theirs, local, size, _COPIES) / 1e6,
    }
    loads = _native_loads(cuda.path)
    if loads is not None:
        measured["latency_us"] = loads(theirs.value, _CHAIN_BYTES, _HOPS)
    return measured


@functools.cache
def _native_loads(runtime: str) -> Callable[..., float] | None:
    """The operator that times loads; None where the native library is absent.

    None too where that library runs on another CUDA runtime than the one in use here.
    """
    import torch  # a probe that measures nothing does without

    from ..bindings import native

    try:
        native.load("cuda")
    except NativeLibraryError as error:
        _log.info("latency is not measured: %s", error)
        return None
    if find_loaded_library("libcudart") != runtime and "amdhip" not in runtime:
        return None
    operator: Callable[..., float] = torch.ops.communicators.load_latency_us
    return operator


class _Pipe:
    """The Queue over one end of a pipe that was inherited."""

    def __init__(self, descriptor: int, writable: bool) -> None:
        self._connection = Connection(descriptor, readable=not writable, writable=writable)

    def put(self, obj: Any, /) -> None:
        try:
            self._connection.send(obj)
        except BrokenPipeError as error:
            raise CommunicatorError("the other process of the probe ended") from error

    def get(self, *, timeout: float) -> Any:
        try:
            if not self._connection.poll(timeout):
                raise queue.Empty
            return self._connection.recv()
        except EOFError as error:
            raise CommunicatorError("the other process of the probe ended") from error


def main(arguments: Sequence[str]) -> None:
    """Entry of one side: role, ordinals and pipe ends come from p2p.py."""
    parser = argparse.ArgumentParser(prog="communicators.peer_access.p2p_worker")
    parser.add_argument("role", choices=("producer", "consumer"))
    parser.add_argument("--devices", type=lambda text: [int(one) for one in text.split(",")])
    parser.add_argument("--pipes", type=lambda text: [int(one) for one in text.split(",")])
    parser.add_argument("--visible")
    parser.add_argument("--cudart")
    parser.add_argument("--size", type=int, default=PROOF_BYTES)
    parser.add_argument("--timeout", type=float, default=60.0)
    given = parser.parse_args(arguments)
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG: end with the parent
    handles, acknowledgements, results = given.pipes
    is_producer = given.role == "producer"
    result_queue = _Pipe(results, True)
    if given.visible is not None:
        update_environment_variables({"CUDA_VISIBLE_DEVICES": given.visible})
    try:
        if given.cudart is None:
            importlib.import_module("torch")  # brings a CUDA runtime into the process
        cuda = CudaRTLibrary(given.cudart)
        if given.size > PROOF_BYTES and not is_producer:
            _native_loads(cuda.path)  # before the pairs' time runs
    except (CommunicatorError, ImportError) as error:
        result_queue.put(Report(given.role, -1, str(error), transient=True))
        return
    result_queue.put(Report(given.role, -1))  # started
    (producer if is_producer else consumer)(
        given.devices,
        _Pipe(handles, is_producer),
        _Pipe(acknowledgements, not is_producer),
        result_queue,
        cuda=cuda,
        size=given.size,
        timeout_s=given.timeout,
    )
