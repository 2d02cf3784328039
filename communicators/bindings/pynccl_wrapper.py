"""NCCLLibrary: NCCL (or RCCL) through ctypes, the one that torch has loaded.

torch.distributed's NCCL backend cannot be captured in every graph, reached for windows, or used
without torch.distributed; the library's C interface can. Types and values are those of nccl.h.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_void_p
from typing import Any

import torch

from ..errors import CommunicatorError, InvalidArgumentError, NativeLibraryError
from .library import SharedLibrary, find_loaded_library
from .nccl_types import (
    FP8_DTYPES,
    FP8_SINCE,
    NCCL_REDUCTIONS,
    NCCL_WIN_COLL_SYMMETRIC,
    buffer_type,
    cudaStream_t,
    ncclComm_t,
    ncclConfig_t,
    ncclDataTypeEnum,
    ncclRedOpTypeEnum,
    ncclResult_t,
    ncclUniqueId,
    ncclWindow_t,
)

__all__ = [
    "FP8_DTYPES",
    "FP8_SINCE",
    "NCCL_REDUCTIONS",
    "NCCL_WIN_COLL_SYMMETRIC",
    "NCCLLibrary",
    "NcclError",
    "buffer_type",
    "cudaStream_t",
    "find_nccl_library",
    "format_version",
    "ncclComm_t",
    "ncclConfig_t",
    "ncclDataTypeEnum",
    "ncclRedOpTypeEnum",
    "ncclResult_t",
    "ncclUniqueId",
    "ncclWindow_t",
]

_SUCCESS, _IN_PROGRESS = 0, 7  # ncclResult_t


class NcclError(CommunicatorError):
    """An NCCL call failed; `code` is its ncclResult_t."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


_REDUCTION = (buffer_type, buffer_type, c_size_t, c_int, c_int, ncclComm_t, cudaStream_t)
_POINT = (buffer_type, c_size_t, c_int, c_int, ncclComm_t, cudaStream_t)
_ROOTED = (buffer_type, buffer_type, c_size_t, c_int, c_int, ncclComm_t, cudaStream_t)

_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "ncclGetErrorString": (ncclResult_t,),
    "ncclGetVersion": (POINTER(c_int),),
    "ncclGetUniqueId": (POINTER(ncclUniqueId),),
    "ncclCommInitRank": (POINTER(ncclComm_t), c_int, ncclUniqueId, c_int),
    "ncclAllReduce": _REDUCTION,
    "ncclReduce": (*_REDUCTION[:5], c_int, ncclComm_t, cudaStream_t),
    "ncclReduceScatter": _REDUCTION,
    "ncclAllGather": (buffer_type, buffer_type, c_size_t, c_int, ncclComm_t, cudaStream_t),
    "ncclSend": _POINT,
    "ncclRecv": _POINT,
    "ncclBroadcast": _ROOTED,
    "ncclCommDestroy": (ncclComm_t,),
    "ncclGroupStart": (),
    "ncclGroupEnd": (),
}

# Each with the first NCCL that has it.
_OPTIONAL: dict[str, tuple[Any, ...]] = {
    "ncclCommAbort": (ncclComm_t,),  # 2.4
    "ncclCommGetAsyncError": (ncclComm_t, POINTER(ncclResult_t)),  # 2.4
    "ncclGetLastError": (ncclComm_t,),  # 2.13
    "ncclCommInitRankConfig": (
        POINTER(ncclComm_t),
        c_int,
        ncclUniqueId,
        c_int,
        POINTER(ncclConfig_t),
    ),  # 2.14
    "ncclMemAlloc": (POINTER(c_void_p), c_size_t),  # 2.19
    "ncclMemFree": (c_void_p,),  # 2.19
    "ncclCommWindowRegister": (
        ncclComm_t,
        buffer_type,
        c_size_t,
        POINTER(ncclWindow_t),
        c_int,
    ),  # 2.27
    "ncclCommWindowDeregister": (ncclComm_t, ncclWindow_t),  # 2.27
}


def find_nccl_library(so_file: str = "") -> str:
    """`so_file` if it is given (COMMUNICATORS_NCCL_SO_PATH), else the NCCL that torch brings.

    Raises NativeLibraryError when torch is a build without one.
    """
    if so_file:
        return so_file
    loaded = find_loaded_library("libnccl") or find_loaded_library("librccl")
    if loaded is not None:
        return loaded
    if torch.version.cuda is not None:
        return "libnccl.so.2"
    if torch.version.hip is not None:
        return "librccl.so.1"
    raise NativeLibraryError(
        f"torch {torch.__version__} is a CPU build and brings no NCCL; set "
        "COMMUNICATORS_NCCL_SO_PATH to use one of your own"
    )


class NCCLLibrary:
    """NCCL's functions; each raises NcclError with NCCL's own text when it fails.

    Args:
        so_file: path of the library; default: find_nccl_library().

    Buffers, communicators, windows and streams are addresses: an int or a ctypes.c_void_p. Counts
    are of elements. Raises NativeLibraryError when the library cannot be loaded or is not an NCCL.
    """

    def __init__(self, so_file: str | None = None) -> None:
        self.path = find_nccl_library(so_file or "")
        self._library = SharedLibrary(self.path, _FUNCTIONS | _OPTIONAL)
        missing = [name for name in _FUNCTIONS if not self._library.has(name)]
        if missing:
            raise NativeLibraryError(f"{self.path} is not an NCCL: it has no {', '.join(missing)}")
        for name in ("ncclGetErrorString", "ncclGetLastError"):
            if self._library.has(name):
                self._library[name].restype = c_char_p

    def has(self, name: str) -> bool:
        """Whether this NCCL has the function; older ones lack some."""
        return self._library.has(name)

    def _call(self, name: str, *args: Any) -> None:
        result = self._library[name](*args)
        if result != _SUCCESS:
            self.NCCL_CHECK(result, name)

    def NCCL_CHECK(self, result: int, call: str = "an NCCL call") -> None:
        """NcclError unless `result` is ncclSuccess, or ncclInProgress of a non-blocking comm."""
        if result in (_SUCCESS, _IN_PROGRESS):
            return
        text = f"{call} failed: {self.ncclGetErrorString(result)}"
        if self.has("ncclGetLastError"):
            last = self._library["ncclGetLastError"](None)
            text += f" ({last.decode(errors='replace').strip()})" if last else ""
        raise NcclError(text, result)

    def ncclGetErrorString(self, result: int) -> str:
        """NCCL's own text for a result."""
        return str(self._library["ncclGetErrorString"](result).decode())

    def ncclGetRawVersion(self) -> int:
        """The version as one number: 22809."""
        version = c_int()
        self._call("ncclGetVersion", ctypes.byref(version))
        return version.value

    def ncclGetVersion(self) -> str:
        """The version as text: '2.28.9'."""
        return format_version(self.ncclGetRawVersion())

    def ncclGetUniqueId(self) -> ncclUniqueId:
        """What one rank creates and all ranks of a communicator need."""
        unique_id = ncclUniqueId()
        self._call("ncclGetUniqueId", ctypes.byref(unique_id))
        return unique_id

    def unique_id_from_bytes(self, data: bytes) -> ncclUniqueId:
        """The id whose 128 bytes another rank sent."""
        if len(data) != ctypes.sizeof(ncclUniqueId):
            raise InvalidArgumentError(f"an ncclUniqueId has 128 bytes, got {len(data)}")
        return ncclUniqueId.from_buffer_copy(data)

    def ncclCommInitRank(self, world_size: int, unique_id: ncclUniqueId, rank: int) -> ncclComm_t:
        """Collective over the ranks; the communicator is bound to the current device."""
        comm = ncclComm_t()
        self._call("ncclCommInitRank", ctypes.byref(comm), world_size, unique_id, rank)
        return comm

    def ncclCommInitRankConfig(
        self, world_size: int, unique_id: ncclUniqueId, rank: int, config: ncclConfig_t
    ) -> ncclComm_t:
        """As ncclCommInitRank. With `config.blocking = 0` poll ncclCommGetAsyncError."""
        comm = ncclComm_t()
        self._call(
            "ncclCommInitRankConfig",
            ctypes.byref(comm),
            world_size,
            unique_id,
            rank,
            ctypes.byref(config),
        )
        return comm

    def ncclAllReduce(
        self,
        sendbuff: Any,
        recvbuff: Any,
        count: int,
        datatype: int,
        op: int,
        comm: Any,
        stream: Any,
    ) -> None:
        self._call("ncclAllReduce", sendbuff, recvbuff, count, datatype, op, comm, stream)

    def ncclReduce(
        self,
        sendbuff: Any,
        recvbuff: Any,
        count: int,
        datatype: int,
        op: int,
        root: int,
        comm: Any,
        stream: Any,
    ) -> None:
        self._call("ncclReduce", sendbuff, recvbuff, count, datatype, op, root, comm, stream)

    def ncclReduceScatter(
        self,
        sendbuff: Any,
        recvbuff: Any,
        count: int,
        datatype: int,
        op: int,
        comm: Any,
        stream: Any,
    ) -> None:
        """`count` is of the elements that one rank receives."""
        self._call("ncclReduceScatter", sendbuff, recvbuff, count, datatype, op, comm, stream)

    def ncclAllGather(
        self, sendbuff: Any, recvbuff: Any, count: int, datatype: int, comm: Any, stream: Any
    ) -> None:
        """`count` is of the elements that one rank sends."""
        self._call("ncclAllGather", sendbuff, recvbuff, count, datatype, comm, stream)

    def ncclSend(
        self, sendbuff: Any, count: int, datatype: int, dest: int, comm: Any, stream: Any
    ) -> None:
        self._call("ncclSend", sendbuff, count, datatype, dest, comm, stream)

    def ncclRecv(
        self, recvbuff: Any, count: int, datatype: int, src: int, comm: Any, stream: Any
    ) -> None:
        self._call("ncclRecv", recvbuff, count, datatype, src, comm, stream)

    def ncclBroadcast(
        self,
        sendbuff: Any,
        recvbuff: Any,
        count: int,
        datatype: int,
        root: int,
        comm: Any,
        stream: Any,
    ) -> None:
        self._call("ncclBroadcast", sendbuff, recvbuff, count, datatype, root, comm, stream)

    def ncclGroupStart(self) -> None:
        """The calls up to ncclGroupEnd are started together: sends and receives cannot deadlock."""
        self._call("ncclGroupStart")

    def ncclGroupEnd(self) -> None:
        self._call("ncclGroupEnd")

    def ncclCommDestroy(self, comm: Any) -> None:
        """Waits for what was started, and for the peers to destroy theirs."""
        self._call("ncclCommDestroy", comm)

    def ncclCommAbort(self, comm: Any) -> None:
        """Ends what is running, also when a peer is gone, and frees the communicator."""
        self._call("ncclCommAbort", comm)

    def ncclCommGetAsyncError(self, comm: Any) -> int:
        """The ncclResult_t that the communicator is in: 0 fine, 7 in progress, else an error."""
        state = ncclResult_t()
        self._call("ncclCommGetAsyncError", comm, ctypes.byref(state))
        return state.value

    def ncclMemAlloc(self, size: int) -> c_void_p:
        """Device memory that ncclCommWindowRegister takes."""
        pointer = c_void_p()
        self._call("ncclMemAlloc", ctypes.byref(pointer), size)
        return pointer

    def ncclMemFree(self, pointer: Any) -> None:
        self._call("ncclMemFree", pointer)

    def ncclCommWindowRegister(
        self, comm: Any, buff: Any, size: int, win_flags: int = NCCL_WIN_COLL_SYMMETRIC
    ) -> ncclWindow_t:
        """Collective: every rank registers a buffer of the same size."""
        window = ncclWindow_t()
        self._call("ncclCommWindowRegister", comm, buff, size, ctypes.byref(window), win_flags)
        return window

    def ncclCommWindowDeregister(self, comm: Any, window: Any) -> None:
        self._call("ncclCommWindowDeregister", comm, window)


def format_version(raw: int) -> str:
    """22809 -> '2.28.9'. Up to 2.8 the number was major * 1000 + minor * 100 + patch."""
    major, rest = divmod(raw, 10000) if raw >= 10000 else divmod(raw, 1000)
    minor, patch = divmod(rest, 100)
    return f"{major}.{minor}.{patch}"
