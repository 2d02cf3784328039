"""Tensors in memory from NCCL's allocator, registered as symmetric windows.

Inside `use_symmetric_memory(group)` torch allocates from a pool whose segments come from
ncclMemAlloc; on the way out each new segment is registered with the group's PyNcclCommunicator,
once. Collectives of NCCL 2.27 and later take faster paths when all their buffers lie there.
The hooks that torch calls are in the native CUDA library, so nothing is compiled at run time.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CommMismatchError, CommunicatorError, NativeLibraryError, RefusedError
from ..settings import Settings
from . import native
from .cuda_wrapper import CudaRTLibrary
from .pynccl_wrapper import find_nccl_library

if TYPE_CHECKING:
    from ..backends.nccl.pynccl import PyNcclCommunicator
    from ..groups.coordinator import GroupCoordinator

_RELAXED = 2  # cudaStreamCaptureModeRelaxed


class Hooks:
    """The native allocation hooks, bound to one NCCL.

    Args:
        library: path of the native library that holds them.
        nccl_path: the NCCL whose ncclMemAlloc they call.

    Raises NativeLibraryError when that cannot be loaded or has no ncclMemAlloc.
    """

    def __init__(self, library: str, nccl_path: str) -> None:
        self.library, self.nccl_path = library, nccl_path
        self._functions = ctypes.CDLL(library)
        bind = self._functions.communicators_nccl_allocator_bind
        bind.argtypes, bind.restype = [ctypes.c_char_p], ctypes.c_int
        outcome = bind(nccl_path.encode())
        if outcome == 1:
            raise NativeLibraryError(f"the allocator cannot load {nccl_path}")
        if outcome == 2:
            raise NativeLibraryError(
                f"{nccl_path} has no ncclMemAlloc; NCCL 2.19 and later have it"
            )
        self._allocation = self._functions.communicators_nccl_allocation
        self._allocation.argtypes, self._allocation.restype = [ctypes.c_void_p], ctypes.c_int64

    def allocation(self, address: int) -> int:
        """The how-manieth allocation of this process the address was; 0 if none that lives."""
        return int(self._allocation(address))

    def allocator(self) -> Any:
        """torch's wrapper of the hooks; it must outlive every pool made with it."""
        return torch.cuda.memory.CUDAPluggableAllocator(
            self.library, "communicators_nccl_alloc", "communicators_nccl_free"
        )


_hooks: Hooks | None = None  # one per process: it knows which NCCL to free with
_allocator: Any = None
_pools: dict[int, torch.cuda.MemPool] = {}  # one per device, for the life of the process
_graph_pool_id: Any = None


def is_symmetric_memory_enabled() -> bool:
    """Whether COMMUNICATORS_SYMMETRIC_MEMORY is on."""
    return Settings.from_environment().symmetric_memory


def set_graph_pool_id(graph_pool_id: Any) -> None:
    """Names the pool of the CUDA graph that is about to be captured (`graph.pool()`).

    Needed for `use_symmetric_memory` within a capture: torch serves one pool at a time, so the
    graph's is set aside meanwhile.
    """
    global _graph_pool_id
    _graph_pool_id = graph_pool_id


def get_nccl_mem_pool(nccl_path: str | None = None) -> torch.cuda.MemPool:
    """The current device's pool of memory from NCCL, made on first use.

    Args:
        nccl_path: the NCCL library to take; default: the one that communicators take. Memory and
            communicators must come from the same one.

    Raises NativeLibraryError where NCCL or the native library cannot do it.
    """
    global _hooks, _allocator
    path = nccl_path or find_nccl_library(Settings.from_environment().nccl_so_path)
    if _hooks is None:
        _hooks = Hooks(str(native.load("cuda")), path)
        _allocator = _hooks.allocator()
    elif nccl_path is not None and _hooks.nccl_path != nccl_path:
        raise NativeLibraryError(
            f"memory comes from {_hooks.nccl_path} already; it cannot come from {nccl_path} too"
        )
    device = torch.cuda.current_device()
    if device not in _pools:
        _pools[device] = torch.cuda.MemPool(_allocator.allocator())
    return _pools[device]


class use_symmetric_memory:
    """Context: tensors made inside lie in memory that is registered with the group's NCCL.

    Every rank of the group must allocate the same sizes inside, in the same order: registration is
    collective. Without COMMUNICATORS_SYMMETRIC_MEMORY=1, or where the group has no live
    PyNcclCommunicator, the context does nothing.

    Args:
        group_coordinator: a GroupCoordinator, or a PyNcclCommunicator itself, which is then used
            whatever the setting says.

    Raises CommMismatchError on leaving when the ranks allocated different sizes, CommTimeoutError
    when a rank allocated nothing new while others did, and RefusedError within a graph's capture
    that `set_graph_pool_id` was not told of.
    """

    def __init__(self, group_coordinator: GroupCoordinator | PyNcclCommunicator) -> None:
        self.communicator = _find_communicator(group_coordinator)
        self._scope = contextlib.ExitStack()
        self._capturing = False

    def __enter__(self) -> use_symmetric_memory:
        if self.communicator is None:
            return self
        device = self.communicator.device
        assert self.communicator.nccl is not None
        self._scope.enter_context(torch.cuda.device(device))
        self._capturing = torch.cuda.is_current_stream_capturing()
        pool = get_nccl_mem_pool(self.communicator.nccl.path)
        if self._capturing:
            if _graph_pool_id is None:
                self._scope.close()
                raise RefusedError(
                    "use_symmetric_memory within a graph's capture needs "
                    "set_graph_pool_id(graph.pool()) before it"
                )
            # torch asks the pools in the order of their beginning: the graph's would answer first.
            torch._C._cuda_endAllocateToPool(device.index, _graph_pool_id)
            self._scope.callback(
                torch._C._cuda_beginAllocateCurrentThreadToPool, device.index, _graph_pool_id
            )
        self._scope.enter_context(torch.cuda.use_mem_pool(pool))
        return self

    def tag(self, tensor: torch.Tensor) -> None:
        """Marks a tensor as lying in symmetric memory, for code that asks for the attribute."""
        tensor.symmetric_memory = self.communicator is not None  # type: ignore[attr-defined]

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        if self.communicator is None:
            return
        with self._scope:  # closed also when registration fails
            if exc_type is None:
                assert _hooks is not None
                pool = get_nccl_mem_pool()
                register_new_segments(
                    self.communicator, pool.snapshot(), _hooks.allocation, self._capturing
                )


def register_new_segments(
    communicator: PyNcclCommunicator,
    segments: Sequence[dict[str, Any]],
    allocation: Callable[[int], int],
    capturing: bool = False,
) -> None:
    """Registers the segments that have no window yet. Collective if there are any.

    Windows pair up by the order of registration, so segments go by their order of allocation,
    which is the same on ranks that allocate alike; their addresses need not be.

    Args:
        segments: of torch's snapshot of the pool: "address" and "total_size" of each.
        allocation: address -> how-manieth allocation it was.
    """
    new = [
        (allocation(one["address"]), one["address"], one["total_size"])
        for one in segments
        if one["address"] not in communicator.windows
    ]
    if not new:
        return
    new.sort()
    sizes = [size for _, _, size in new]
    everybody = communicator.group.gather_objects("symmetric memory", sizes)
    for rank, theirs in enumerate(everybody):
        if theirs != sizes:
            raise CommMismatchError(
                f"use_symmetric_memory: rank {communicator.group.rank} allocated segments of "
                f"{sizes} bytes and rank {rank} of {theirs}; all ranks must allocate alike"
            )
    runtime = CudaRTLibrary() if capturing else None
    before = runtime.cudaThreadExchangeStreamCaptureMode(_RELAXED) if runtime else 0
    try:
        for _, address, size in new:
            communicator.register_comm_window_raw(address, size)
    finally:
        if runtime:
            runtime.cudaThreadExchangeStreamCaptureMode(before)


def _find_communicator(
    group_coordinator: GroupCoordinator | PyNcclCommunicator,
) -> PyNcclCommunicator | None:
    if hasattr(group_coordinator, "register_comm_window_raw"):
        communicator: Any = group_coordinator
        communicator.require_live()
    else:
        communicator = getattr(group_coordinator, "pynccl_comm", None)
        if not is_symmetric_memory_enabled() or communicator is None or communicator.disabled:
            return None
    if not communicator.nccl.has("ncclCommWindowRegister"):
        raise CommunicatorError(
            f"NCCL {communicator.nccl.ncclGetVersion()} has no windows; NCCL 2.27 and later have"
        )
    return communicator
