"""pynccl_allocator.py: the native hooks over a fake NCCL, and the registration of segments."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from communicators import Group
from communicators.bindings import pynccl_allocator
from communicators.bindings.pynccl_allocator import (
    Hooks,
    register_new_segments,
    use_symmetric_memory,
)
from communicators.errors import CommMismatchError, CommTimeoutError, NativeLibraryError
from tests.threads import run_ranks
from tests.unit.fakes import compile_fake

_REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The hooks, compiled from the source that ships, over a fake device guard."""
    if shutil.which("g++") is None:
        pytest.skip("the hooks need a C++ compiler")
    output = tmp_path_factory.mktemp("hooks") / "libhooks.so"
    source = _REPOSITORY / "native" / "torch" / "nccl_allocator_cuda.cpp"
    include = Path(__file__).parent / "fake_libraries" / "include"
    options = ["-std=c++20", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-I", str(include)]
    subprocess.run(
        ["g++", *options, "-o", str(output), str(source), "-ldl"],
        check=True,
        timeout=120,
    )
    return str(output)


@pytest.fixture(scope="module")
def nccl(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compile_fake("nccl", tmp_path_factory.mktemp("lib") / "libfake_nccl.so")


def functions(library: str) -> Any:
    loaded = ctypes.CDLL(library)
    loaded.communicators_nccl_alloc.restype = ctypes.c_void_p
    loaded.communicators_nccl_alloc.argtypes = [ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    loaded.communicators_nccl_free.restype = None
    loaded.communicators_nccl_free.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_void_p,
    ]
    return loaded


def test_the_hooks_allocate_from_nccl_and_count(library: str, nccl: str) -> None:
    torchs_view = functions(library)
    fresh = shutil.copy(library, library + ".unbound.so")
    assert functions(fresh).communicators_nccl_alloc(64, 0, None) is None  # bound to no NCCL yet
    hooks = Hooks(library, nccl)
    first = torchs_view.communicators_nccl_alloc(1 << 20, 0, None)
    second = torchs_view.communicators_nccl_alloc(64, 1, None)
    assert 0 < hooks.allocation(first) < hooks.allocation(second)
    ctypes.memset(first, 5, 1 << 20)
    torchs_view.communicators_nccl_free(first, 1 << 20, 0, None)
    assert hooks.allocation(first) == 0 and hooks.allocation(second) > 0
    torchs_view.communicators_nccl_free(second, 64, 1, None)
    torchs_view.communicators_nccl_free(None, 0, 0, None)


def test_what_fails_in_a_hook_is_no_memory_and_never_an_exception(
    library: str, nccl: str, capfd: pytest.CaptureFixture[str]
) -> None:
    Hooks(library, nccl)
    assert functions(library).communicators_nccl_alloc(64, 9, None) is None
    assert "allocation for NCCL on device 9: invalid device ordinal" in capfd.readouterr().err


def test_an_nccl_that_is_absent_or_too_old(library: str, tmp_path: Path) -> None:
    with pytest.raises(NativeLibraryError, match="the allocator cannot load /absent/libnccl"):
        Hooks(library, "/absent/libnccl.so")
    old = compile_fake("nccl", tmp_path / "libold.so", "-DFAKE_NCCL_OLD")
    with pytest.raises(NativeLibraryError, match=r"has no ncclMemAlloc; NCCL 2\.19"):
        Hooks(library, old)


class Recorder:
    """What register_new_segments needs of a communicator."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.windows: dict[int, Any] = {}
        self.registered: list[tuple[int, int]] = []

    def register_comm_window_raw(self, address: int, size: int) -> None:
        self.windows[address] = object()
        self.registered.append((address, size))


def segment(address: int, size: int) -> dict[str, Any]:
    return {"address": address, "total_size": size}


def test_segments_are_registered_once_in_the_order_of_allocation() -> None:
    def body(group: Group) -> Any:
        comm: Any = Recorder(group)
        # Rank 1 got its two segments at addresses in the other order.
        order = {100: 1, 200: 2} if group.rank == 0 else {200: 1, 100: 2}
        sizes = {1: 2 << 20, 2: 20 << 20}
        segments = [segment(a, sizes[order[a]]) for a in (100, 200)]
        register_new_segments(comm, segments, order.__getitem__)
        register_new_segments(comm, segments, order.__getitem__)  # nothing new: no communication
        register_new_segments(comm, [*segments, segment(300, 64)], {**order, 300: 3}.__getitem__)
        return comm.registered

    first, second = run_ranks(2, body)
    assert first == [(100, 2 << 20), (200, 20 << 20), (300, 64)]
    assert second == [(200, 2 << 20), (100, 20 << 20), (300, 64)]


def test_ranks_that_allocate_differently_find_out() -> None:
    def sizes(group: Group) -> Any:
        comm: Any = Recorder(group)
        register_new_segments(comm, [segment(1, 64 << group.rank)], lambda address: 1)

    for error in run_ranks(2, sizes):
        assert isinstance(error, CommMismatchError) and "must allocate alike" in str(error)

    def nothing_new(group: Group) -> Any:
        comm: Any = Recorder(group)
        register_new_segments(comm, [segment(1, 64)] if group.rank == 0 else [], lambda a: 1)

    late, fine = run_ranks(2, nothing_new, timeout_s=1.0)
    assert isinstance(late, CommTimeoutError) and "'symmetric memory' for rank 1" in str(late)
    assert fine is None


def test_the_context_does_nothing_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Coordinator:
        pynccl_comm = None

    coordinator: Any = Coordinator()
    monkeypatch.delenv("COMMUNICATORS_SYMMETRIC_MEMORY", raising=False)
    assert not pynccl_allocator.is_symmetric_memory_enabled()
    monkeypatch.setenv("COMMUNICATORS_SYMMETRIC_MEMORY", "1")
    assert pynccl_allocator.is_symmetric_memory_enabled()
    with use_symmetric_memory(coordinator) as symmetric:  # no PyNcclCommunicator
        x = torch.ones(3)
        symmetric.tag(x)
    assert symmetric.communicator is None
    assert x.symmetric_memory is False  # type: ignore[attr-defined]


def test_graph_pool_id_is_kept() -> None:
    pynccl_allocator.set_graph_pool_id((0, 7))
    assert pynccl_allocator._graph_pool_id == (0, 7)
    pynccl_allocator.set_graph_pool_id(None)
