"""pynccl_wrapper.py against a fake libnccl that the test compiles."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from torch.distributed import ReduceOp

from communicators.bindings import library
from communicators.bindings.pynccl_wrapper import (
    NcclError,
    NCCLLibrary,
    find_nccl_library,
    format_version,
    ncclConfig_t,
    ncclDataTypeEnum,
    ncclRedOpTypeEnum,
    ncclUniqueId,
)
from communicators.errors import InvalidArgumentError, NativeLibraryError
from tests.unit.fakes import compile_fake

FLOAT, SUM = int(ncclDataTypeEnum.ncclFloat32), int(ncclRedOpTypeEnum.ncclSum)


@pytest.fixture(scope="module")
def nccl(tmp_path_factory: pytest.TempPathFactory) -> NCCLLibrary:
    return NCCLLibrary(compile_fake("nccl", tmp_path_factory.mktemp("lib") / "libfake_nccl.so"))


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> NCCLLibrary:
    path = tmp_path_factory.mktemp("lib") / "libfake_old_nccl.so"
    return NCCLLibrary(compile_fake("nccl", path, "-DFAKE_NCCL_OLD"))


def comm_of_one(nccl: NCCLLibrary) -> ctypes.c_void_p:
    return nccl.ncclCommInitRank(1, nccl.ncclGetUniqueId(), 0)


@pytest.mark.parametrize(
    ("raw", "text"),
    [(22809, "2.28.9"), (21801, "2.18.1"), (21005, "2.10.5"), (2708, "2.7.8"), (2804, "2.8.4")],
)
def test_versions_print_right(raw: int, text: str) -> None:
    assert format_version(raw) == text


def test_version_of_the_library(nccl: NCCLLibrary, old: NCCLLibrary) -> None:
    assert (nccl.ncclGetRawVersion(), nccl.ncclGetVersion()) == (22809, "2.28.9")
    assert old.ncclGetVersion() == "2.12.10"


def test_sizes_of_the_structs() -> None:
    assert ctypes.sizeof(ncclUniqueId) == 128
    config = ncclConfig_t(blocking=0, maxCTAs=4)
    assert (config.size, config.magic, config.blocking) == (48, 0xCAFEBEEF, 0)
    assert (config.maxCTAs, config.minCTAs) == (4, -(2**31))


def test_data_types_and_reductions() -> None:
    assert ncclDataTypeEnum.from_torch(torch.bfloat16) == 9
    assert ncclDataTypeEnum.from_torch(torch.float8_e4m3fn) == 10
    assert ncclDataTypeEnum.from_torch(torch.float8_e5m2) == 11
    with pytest.raises(
        InvalidArgumentError, match=r"no data type for torch\.complex64; it has int8"
    ):
        ncclDataTypeEnum.from_torch(torch.complex64)
    assert [
        ncclRedOpTypeEnum.from_torch(op)
        for op in (ReduceOp.SUM, ReduceOp.PRODUCT, ReduceOp.MAX, ReduceOp.MIN, ReduceOp.AVG)
    ] == [0, 1, 2, 3, 4]
    with pytest.raises(InvalidArgumentError, match="not by"):
        ncclRedOpTypeEnum.from_torch(ReduceOp.BXOR)


def test_every_call_reaches_the_library_with_its_arguments(nccl: NCCLLibrary) -> None:
    comm = comm_of_one(nccl)
    x, y = torch.arange(8.0), torch.zeros(8)
    a, b = x.data_ptr(), y.data_ptr()

    def arrived() -> bool:
        same = torch.equal(x, y)
        y.zero_()
        return same

    nccl.ncclAllReduce(a, b, 8, FLOAT, SUM, comm, None)
    assert arrived()
    nccl.ncclReduce(a, b, 8, FLOAT, SUM, 0, comm, None)
    assert arrived()
    nccl.ncclReduceScatter(a, b, 8, FLOAT, SUM, comm, None)
    assert arrived()
    nccl.ncclAllGather(a, b, 8, FLOAT, comm, None)
    assert arrived()
    nccl.ncclBroadcast(a, b, 8, FLOAT, 0, comm, None)
    assert arrived()
    nccl.ncclGroupStart()
    nccl.ncclSend(a, 8, FLOAT, 0, comm, None)
    nccl.ncclRecv(b, 8, FLOAT, 0, comm, None)
    nccl.ncclGroupEnd()
    assert arrived()
    window = nccl.ncclCommWindowRegister(comm, a, 32)
    nccl.ncclCommWindowDeregister(comm, window)
    memory = nccl.ncclMemAlloc(1024)
    nccl.ncclMemFree(memory)
    assert nccl.ncclCommGetAsyncError(comm) == 0
    nccl.ncclCommDestroy(comm)
    assert nccl.ncclCommGetAsyncError(comm) == 6
    aborted = nccl.ncclCommInitRankConfig(1, nccl.ncclGetUniqueId(), 0, ncclConfig_t(blocking=1))
    nccl.ncclCommAbort(aborted)


def test_a_unique_id_travels_as_bytes(nccl: NCCLLibrary) -> None:
    unique_id = nccl.ncclGetUniqueId()
    assert bytes(nccl.unique_id_from_bytes(bytes(unique_id))) == bytes(unique_id)
    with pytest.raises(InvalidArgumentError, match="128 bytes, got 3"):
        nccl.unique_id_from_bytes(b"abc")


def test_errors_name_the_call_and_nccls_own_text(nccl: NCCLLibrary, old: NCCLLibrary) -> None:
    comm = comm_of_one(nccl)
    with pytest.raises(NcclError) as caught:
        nccl.ncclCommWindowRegister(comm, 0, 0)
    assert str(caught.value) == (
        "ncclCommWindowRegister failed: invalid argument (the fake's last error)"
    )
    assert caught.value.code == 4
    with pytest.raises(NcclError, match=r"^an NCCL call failed: remote process exited"):
        old.NCCL_CHECK(6)
    nccl.NCCL_CHECK(0)
    nccl.NCCL_CHECK(7)  # in progress: not an error


def test_what_an_old_nccl_lacks_is_an_absent_feature(old: NCCLLibrary) -> None:
    comm = comm_of_one(old)
    assert not old.has("ncclCommWindowRegister") and old.has("ncclAllReduce")
    with pytest.raises(NativeLibraryError, match="has no function ncclMemAlloc"):
        old.ncclMemAlloc(1)
    old.ncclCommDestroy(comm)


def test_a_library_that_is_no_nccl(tmp_path: Path) -> None:
    source = tmp_path / "x.c"
    source.write_text("int ncclGetVersion(int* v) { return *v = 0; }\n")
    path = tmp_path / "libx.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", path, source], check=True)
    with pytest.raises(NativeLibraryError, match="is not an NCCL: it has no ncclGetErrorString"):
        NCCLLibrary(str(path))


def test_where_the_library_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_nccl_library("/mine/libnccl.so") == "/mine/libnccl.so"
    maps = tmp_path / "maps"
    monkeypatch.setattr(library, "_MAPS", maps)
    maps.write_text("7f10-7f20 r-xp 00001000 08:01 131   /torch/lib/libnccl.so.2\n")
    assert find_nccl_library() == "/torch/lib/libnccl.so.2"
    maps.write_text("")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert find_nccl_library() == "libnccl.so.2"
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(NativeLibraryError, match="COMMUNICATORS_NCCL_SO_PATH"):
        find_nccl_library()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert find_nccl_library() == "librccl.so.1"
