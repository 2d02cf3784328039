"""cuda_wrapper.py against a fake libcudart that the test compiles."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

from communicators.bindings import library
from communicators.bindings.cuda_wrapper import (
    CudaError,
    CudaLibraryNotFoundError,
    CudaRTLibrary,
    cudaIpcMemHandle_t,
    find_loaded_library,
)
from communicators.errors import CommunicatorError, NativeLibraryError
from tests.unit.fakes import compile_fake


@pytest.fixture(scope="module")
def fake_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compile_fake("cudart", tmp_path_factory.mktemp("lib") / "libfake_runtime.so.13")


@pytest.fixture
def cuda(fake_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CudaRTLibrary:
    monkeypatch.setenv("FAKE_CUDART_DIR", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return CudaRTLibrary(fake_path)


def maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *paths: str) -> None:
    file = tmp_path / "maps"
    lines = ["7f00-7f01 r--p 00000000 00:00 0 ", "7fff-8000 r-xp 00000000 00:00 0   [vdso]"]
    lines += [f"7f10-7f20 r-xp 00001000 08:01 131   {path}" for path in paths]
    file.write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(library, "_MAPS", file)


def test_a_handle_has_64_bytes() -> None:
    assert ctypes.sizeof(cudaIpcMemHandle_t) == 64


@pytest.mark.parametrize(
    ("mapped", "found"),
    [
        (["/usr/lib/libcudart.so.13"], "/usr/lib/libcudart.so.13"),
        (["/a b/libcudart-d0da41ae.so.11.0"], "/a b/libcudart-d0da41ae.so.11.0"),
        (["/x/lib64/stubs/libcudart.so", "/y/libcudart.so.12"], "/y/libcudart.so.12"),
        (["/y/libcudart.so.12 (deleted)"], "/y/libcudart.so.12"),
        (["/y/libcudart_static.a", "/y/libcudartx.so", "/y/xlibcudart.so"], None),
        (["/libcudart/libother.so"], None),
        ([], None),
    ],
)
def test_find_loaded_library(
    mapped: list[str], found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps(tmp_path, monkeypatch, *mapped)
    assert find_loaded_library("libcudart") == found


def test_a_library_that_the_process_has_loaded_is_found_and_used(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = compile_fake("cudart", tmp_path_factory.mktemp("loaded") / "libfakeruntime.so.99")
    loaded = ctypes.CDLL(path)  # really mapped: /proc/self/maps shows it
    assert find_loaded_library("libfakeruntime") == path
    del loaded
    named = tmp_path / "libcudart.so.99"
    named.symlink_to(path)
    maps(tmp_path, monkeypatch, str(named))
    assert CudaRTLibrary().path == str(named)
    assert CudaRTLibrary().cudaGetErrorString(2) == "out of memory"


def test_no_library_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps(tmp_path, monkeypatch, "/lib/libc.so.6")
    with pytest.raises(CudaLibraryNotFoundError, match="neither libcudart nor libamdhip64"):
        CudaRTLibrary()
    with pytest.raises(NativeLibraryError, match="cannot be loaded"):
        CudaRTLibrary(str(tmp_path / "absent.so"))


def test_memory_is_set_copied_and_freed(cuda: CudaRTLibrary, tmp_path: Path) -> None:
    cuda.cudaSetDevice(1)
    a, b = cuda.cudaMalloc(64), cuda.cudaMalloc(64)
    cuda.cudaMemset(a, 7, 64)
    cuda.cudaMemcpy(b, a, 64)
    host = ctypes.create_string_buffer(64)
    cuda.cudaMemcpyAsync(ctypes.cast(host, ctypes.c_void_p), b, 64)
    cuda.cudaDeviceSynchronize()
    assert host.raw == bytes([7]) * 64
    cuda.cudaFree(a)
    with pytest.raises(CudaError, match=r"cudaFree failed: invalid argument \(cudaError_t 1\)"):
        cuda.cudaFree(a)
    cuda.cudaDeviceReset()
    assert list(tmp_path.iterdir()) == []


def test_a_handle_maps_the_same_memory_once(cuda: CudaRTLibrary) -> None:
    mine = cuda.cudaMalloc(16)
    peers = cuda.cudaIpcOpenMemHandle(cuda.cudaIpcGetMemHandle(mine))
    assert peers.value != mine.value
    cuda.cudaMemset(peers, 3, 16)
    assert mine.value is not None and ctypes.string_at(mine.value, 16) == bytes([3]) * 16
    cuda.cudaIpcCloseMemHandle(peers)
    with pytest.raises(CudaError, match="cudaIpcCloseMemHandle failed"):
        cuda.cudaIpcCloseMemHandle(peers)
    cuda.cudaFree(mine)


def test_errors_carry_call_text_and_code(cuda: CudaRTLibrary) -> None:
    with pytest.raises(CudaError, match="cudaSetDevice failed: invalid device ordinal") as caught:
        cuda.cudaSetDevice(9)
    assert caught.value.code == 101 and isinstance(caught.value, CommunicatorError)
    with pytest.raises(CudaError, match="cudaMalloc failed: out of memory"):
        cuda.cudaMalloc(1 << 40)
    with pytest.raises(CudaError, match="a CUDA call failed"):
        cuda.CUDART_CHECK(400)
    cuda.CUDART_CHECK(0)


def test_peers_events_and_capture_mode(
    cuda: CudaRTLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cuda.cudaGetDeviceCount() == 2
    assert cuda.cudaDeviceCanAccessPeer(0, 1)
    monkeypatch.setenv("FAKE_CUDART_FAULTS", "0>1:noaccess")
    assert not cuda.cudaDeviceCanAccessPeer(0, 1) and cuda.cudaDeviceCanAccessPeer(1, 0)
    start, end = cuda.cudaEventCreate(), cuda.cudaEventCreate()
    cuda.cudaEventRecord(start)
    cuda.cudaEventRecord(end)
    cuda.cudaEventSynchronize(end)
    assert 0 <= cuda.cudaEventElapsedTime(start, end) < 1000
    cuda.cudaEventDestroy(start)
    cuda.cudaEventDestroy(end)
    assert cuda.cudaThreadExchangeStreamCaptureMode(2) == 0
    assert cuda.cudaThreadExchangeStreamCaptureMode(0) == 2


def test_hip_names_are_looked_up_in_a_hip_library(tmp_path: Path) -> None:
    source = tmp_path / "hip.c"
    source.write_text(
        "int hipSetDevice(int d) { return d; }\n"
        'const char* hipGetErrorString(int e) { return e ? "hip says no" : ""; }\n'
        "int hipGetLastError(void) { return 0; }\n"
    )
    path = tmp_path / "libamdhip64.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", path, source], check=True)
    hip = CudaRTLibrary(str(path))
    hip.cudaSetDevice(0)
    with pytest.raises(CudaError, match="cudaSetDevice failed: hip says no"):
        hip.cudaSetDevice(1)
    with pytest.raises(NativeLibraryError, match="has no function cudaMalloc"):
        hip.cudaMalloc(1)
