"""CudaRTLibrary: the CUDA runtime through ctypes, without torch's view of devices and streams.

For what torch does not offer: IPC handles of raw allocations, and a device reset between probes.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_float, c_int, c_size_t, c_void_p
from typing import Any

from ..errors import CommunicatorError, NativeLibraryError
from .library import SharedLibrary, find_loaded_library

__all__ = [
    "CudaError",
    "CudaLibraryNotFoundError",
    "CudaRTLibrary",
    "cudaIpcMemHandle_t",
    "find_loaded_library",
]

cudaError_t = c_int
cudaStream_t = c_void_p
cudaEvent_t = c_void_p

_MEMCPY_DEFAULT = 4  # cudaMemcpyDefault: the direction follows from the addresses
_IPC_LAZY_PEER_ACCESS = 1  # cudaIpcMemLazyEnablePeerAccess, the only flag there is


class cudaIpcMemHandle_t(ctypes.Structure):
    """CUDA_IPC_HANDLE_SIZE is 64 bytes (driver_types.h)."""

    _fields_ = (("internal", ctypes.c_byte * 64),)


class CudaError(CommunicatorError):
    """A CUDA runtime call failed; `code` is its cudaError_t."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class CudaLibraryNotFoundError(NativeLibraryError):
    """No CUDA runtime is loaded in this process, and none was named."""


_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cudaSetDevice": (c_int,),
    "cudaGetDeviceCount": (POINTER(c_int),),
    "cudaDeviceSynchronize": (),
    "cudaDeviceReset": (),
    "cudaDeviceCanAccessPeer": (POINTER(c_int), c_int, c_int),
    "cudaMalloc": (POINTER(c_void_p), c_size_t),
    "cudaFree": (c_void_p,),
    "cudaMemset": (c_void_p, c_int, c_size_t),
    "cudaMemcpy": (c_void_p, c_void_p, c_size_t, c_int),
    "cudaMemcpyAsync": (c_void_p, c_void_p, c_size_t, c_int, cudaStream_t),
    "cudaIpcGetMemHandle": (POINTER(cudaIpcMemHandle_t), c_void_p),
    "cudaIpcOpenMemHandle": (POINTER(c_void_p), cudaIpcMemHandle_t, ctypes.c_uint),
    "cudaIpcCloseMemHandle": (c_void_p,),
    "cudaEventCreate": (POINTER(cudaEvent_t),),
    "cudaEventRecord": (cudaEvent_t, cudaStream_t),
    "cudaEventSynchronize": (cudaEvent_t,),
    "cudaEventElapsedTime": (POINTER(c_float), cudaEvent_t, cudaEvent_t),
    "cudaEventDestroy": (cudaEvent_t,),
    "cudaThreadExchangeStreamCaptureMode": (POINTER(c_int),),
    "cudaGetLastError": (),
    "cudaGetErrorString": (cudaError_t,),
}


class CudaRTLibrary:
    """The CUDA runtime (or HIP's, whose calls have the same arguments).

    Args:
        so_file: path of the library; default: the libcudart or libamdhip64 that this process has
            loaded (import torch first).

    Every call raises CudaError, with the call's name and CUDA's text, when it fails. Calls apply to
    the calling thread's current device.
    Raises CudaLibraryNotFoundError when no library was named and none is loaded.
    """

    def __init__(self, so_file: str | None = None) -> None:
        if so_file is None:
            so_file = find_loaded_library("libcudart") or find_loaded_library("libamdhip64")
        if so_file is None:
            raise CudaLibraryNotFoundError(
                "this process has loaded neither libcudart nor libamdhip64; import a torch with "
                "CUDA first, or give CudaRTLibrary the path of the library"
            )
        self.path = so_file
        hip = "amdhip" in so_file
        self._library = SharedLibrary(
            so_file, _FUNCTIONS, (lambda name: name.replace("cuda", "hip", 1)) if hip else str
        )
        self._library["cudaGetErrorString"].restype = c_char_p

    def _call(self, name: str, *args: Any) -> None:
        self.CUDART_CHECK(self._library[name](*args), name)

    def CUDART_CHECK(self, result: int, call: str = "a CUDA call") -> None:
        """CudaError when `result` is not cudaSuccess."""
        if result != 0:
            text = self.cudaGetErrorString(result)
            # Else the next, innocent call would report this error again.
            self._library["cudaGetLastError"]()
            raise CudaError(f"{call} failed: {text} (cudaError_t {result})", result)

    def cudaGetErrorString(self, error: int) -> str:
        """CUDA's own text for an error."""
        return str(self._library["cudaGetErrorString"](error).decode())

    def cudaSetDevice(self, device: int) -> None:
        self._call("cudaSetDevice", device)

    def cudaGetDeviceCount(self) -> int:
        count = c_int()
        self._call("cudaGetDeviceCount", ctypes.byref(count))
        return count.value

    def cudaDeviceSynchronize(self) -> None:
        self._call("cudaDeviceSynchronize")

    def cudaDeviceReset(self) -> None:
        """Destroys the device's context in this process, torch's allocations with it."""
        self._call("cudaDeviceReset")

    def cudaDeviceCanAccessPeer(self, device: int, peer: int) -> bool:
        """What the driver claims; p2p.py finds out whether it is true."""
        answer = c_int()
        self._call("cudaDeviceCanAccessPeer", ctypes.byref(answer), device, peer)
        return bool(answer.value)

    def cudaMalloc(self, size: int) -> c_void_p:
        pointer = c_void_p()
        self._call("cudaMalloc", ctypes.byref(pointer), size)
        return pointer

    def cudaFree(self, devPtr: c_void_p) -> None:
        self._call("cudaFree", devPtr)

    def cudaMemset(self, devPtr: c_void_p, value: int, count: int) -> None:
        self._call("cudaMemset", devPtr, value, count)

    def cudaMemcpy(self, dst: c_void_p, src: c_void_p, count: int) -> None:
        """Copies `count` bytes, device or host on either side; returns when they have arrived."""
        self._call("cudaMemcpy", dst, src, count, _MEMCPY_DEFAULT)

    def cudaMemcpyAsync(
        self, dst: c_void_p, src: c_void_p, count: int, stream: c_void_p | None = None
    ) -> None:
        self._call("cudaMemcpyAsync", dst, src, count, _MEMCPY_DEFAULT, stream)

    def cudaIpcGetMemHandle(self, devPtr: c_void_p) -> cudaIpcMemHandle_t:
        """A handle of cudaMalloc'ed memory that another process of this host can open."""
        handle = cudaIpcMemHandle_t()
        self._call("cudaIpcGetMemHandle", ctypes.byref(handle), devPtr)
        return handle

    def cudaIpcOpenMemHandle(self, handle: cudaIpcMemHandle_t) -> c_void_p:
        """Maps another process's memory; peer access is enabled where it lies on another GPU."""
        pointer = c_void_p()
        self._call("cudaIpcOpenMemHandle", ctypes.byref(pointer), handle, _IPC_LAZY_PEER_ACCESS)
        return pointer

    def cudaIpcCloseMemHandle(self, devPtr: c_void_p) -> None:
        """Unmaps what cudaIpcOpenMemHandle mapped."""
        self._call("cudaIpcCloseMemHandle", devPtr)

    def cudaEventCreate(self) -> c_void_p:
        event = cudaEvent_t()
        self._call("cudaEventCreate", ctypes.byref(event))
        return event

    def cudaEventRecord(self, event: c_void_p, stream: c_void_p | None = None) -> None:
        self._call("cudaEventRecord", event, stream)

    def cudaEventSynchronize(self, event: c_void_p) -> None:
        self._call("cudaEventSynchronize", event)

    def cudaEventElapsedTime(self, start: c_void_p, end: c_void_p) -> float:
        """Milliseconds between two recorded events."""
        milliseconds = c_float()
        self._call("cudaEventElapsedTime", ctypes.byref(milliseconds), start, end)
        return milliseconds.value

    def cudaEventDestroy(self, event: c_void_p) -> None:
        self._call("cudaEventDestroy", event)

    def cudaThreadExchangeStreamCaptureMode(self, mode: int) -> int:
        """Sets this thread's capture mode (2: relaxed) and returns the one before."""
        exchanged = c_int(mode)
        self._call("cudaThreadExchangeStreamCaptureMode", ctypes.byref(exchanged))
        return exchanged.value
