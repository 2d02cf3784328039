"""What CustomAllreduce, its workspaces and the functional interface decide without a GPU."""

from __future__ import annotations

import ctypes
import re
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from communicators.backends.custom_all_reduce import CustomAllreduce
from communicators.base import Refusal
from communicators.bindings import collectives, native
from communicators.bindings.workspace import LAYOUT
from communicators.errors import (
    CommTimeoutError,
    CommunicatorError,
    InvalidArgumentError,
    RefusedError,
)
from communicators.functional import allreduce
from communicators.peer_access.topology import Verdict
from tests.threads import run_ranks

_ALLOWED = Verdict(2, None, None, None, None)

_STUB = """
#include <stdint.h>
#define EXPORT __attribute__((visibility("default")))
EXPORT const char* communicators_gpu_error(void) { return "InvalidArgumentError: a sentence"; }
EXPORT int communicators_gpu_destroy(int64_t h) { return 0; }
EXPORT int communicators_gpu_retire(int64_t h) { return 0; }
EXPORT int communicators_gpu_check(int64_t h) { return h == 7; }
EXPORT int communicators_gpu_captured(int64_t h, uint64_t* calls, uint64_t* digest) {
  *calls = 5;
  *digest = 77;
  return 0;
}
EXPORT int communicators_gpu_graphs(int64_t h, int* graphs) { return *graphs = 0; }
EXPORT int communicators_gpu_set_timeout_ns(int64_t h, uint64_t ns) { return 0; }
EXPORT uint64_t communicators_custom_ar_bytes(uint64_t a, uint64_t b, uint64_t c) {
  return 65536 + 2 * (a + b + c);
}
EXPORT int communicators_custom_ar_create(int64_t* h, const uint64_t* bases, int world, int rank,
                                          uint64_t a, uint64_t b, uint64_t c) {
  *h = bases[rank] + 1;
  return world == 3;
}
static uint64_t seen[6];
EXPORT uint64_t* seen_arguments(void) { return seen; }
EXPORT int communicators_custom_ar_all_reduce(int64_t h, int d, const void* i, void* o, uint64_t n,
                                              void* s) {
  seen[0] = h; seen[1] = d; seen[2] = (uint64_t)i;
  seen[3] = (uint64_t)o; seen[4] = n; seen[5] = (uint64_t)s;
  return d;
}
EXPORT int communicators_custom_ar_all_gather(int64_t h, const void* i, void* o, uint64_t n,
                                              void* s) {
  return 0;
}
EXPORT int communicators_custom_ar_reduce_scatter(int64_t h, int d, const void* i, void* o,
                                                  uint64_t n, void* s) {
  return 0;
}
EXPORT int communicators_custom_ar_tune(int64_t h, const char* name, int64_t v) { return v < 0; }
EXPORT int communicators_custom_ar_algorithm(int64_t h, uint64_t bytes, int* algorithm) {
  *algorithm = bytes > 9 ? 2 : 1;
  return 0;
}
EXPORT uint64_t communicators_quick_ar_bytes(uint64_t area) { return 4 * area; }
EXPORT int communicators_quick_ar_create(int64_t* h, const uint64_t* bases, int world, int rank,
                                         uint64_t area) {
  *h = bases[rank] + area;
  return world == 3;
}
EXPORT int communicators_quick_ar_all_reduce(int64_t h, int codec, int dtype, const void* i,
                                             void* o, uint64_t bytes, void* stream) {
  return bytes == 20 && dtype == 15 ? codec : 9;
}
EXPORT int communicators_quick_ar_set_launch(int64_t h, int blocks, int threads, int ahead,
                                             int overlap) {
  return blocks + threads + ahead + overlap != 10;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> collectives.Collectives:
    directory = tmp_path_factory.mktemp("stub")
    source, target = directory / "stub.c", directory / "stub.so"
    source.write_text(_STUB)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(target), str(source)], check=True)
    return collectives.Collectives(str(target))


def test_handles_come_from_all_bases(library: collectives.Collectives) -> None:
    assert library.create_custom_ar([1000, 2000], 1, (1, 2, 3)) == 2001
    assert library.custom_ar_bytes(16, 1, 8) == 65536 + 50
    assert library.create_quick_ar([1000, 2000], 1, 5) == 2005
    assert library.quick_ar_bytes(10) == 40


@pytest.fixture(params=["native", "python"])
def all_reduce_call(
    request: pytest.FixtureRequest,
    library: collectives.Collectives,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """A call on host tensors, and a function that tells what the library was given last."""
    if request.param == "python":
        monkeypatch.setattr(native, "python_module", lambda name: None)
        monkeypatch.setattr(collectives, "current_stream", lambda index: 0)
    elif native.python_module("_native_all_reduce") is None:
        pytest.skip("there is no native module")
    seen = library.library.seen_arguments
    seen.restype = ctypes.POINTER(ctypes.c_uint64)
    ctypes.memset(seen(), 0, 48)
    return library.all_reduce_call(2**62 + 5, torch.empty(1)), lambda: seen()[:6]


@pytest.mark.parametrize("dtype", collectives.DTYPES)
def test_a_call_hands_over_what_the_tensors_are(all_reduce_call: Any, dtype: torch.dtype) -> None:
    call, seen = all_reduce_call
    inp = torch.zeros(9, 5, dtype=dtype)[2:]
    out = torch.empty(5, 7, 1, dtype=dtype)
    code = collectives.DTYPES[dtype]
    assert call(inp, out) == code  # the stub's status
    assert seen() == [2**62 + 5, code, inp.data_ptr(), out.data_ptr(), inp.nbytes, 0]
    for same in (inp, torch.zeros((), dtype=dtype), torch.zeros(1, 3, dtype=dtype).t()):
        assert call(same, same) == code
        assert seen() == [2**62 + 5, code, same.data_ptr(), same.data_ptr(), same.nbytes, 0]
    parameter = torch.nn.Parameter(out)
    assert call(parameter, out) == code and seen()[2] == out.data_ptr()


_WHOLE = torch.zeros(4, 4)


@pytest.mark.parametrize(
    ("inp", "out"),
    [
        (_WHOLE, _WHOLE.half()),
        (_WHOLE, torch.zeros(4, 8, dtype=torch.half)),
        (_WHOLE.bfloat16(), _WHOLE.half()),
        (_WHOLE, torch.zeros(15)),
        (_WHOLE.t()[1:], torch.zeros(3, 4)),
        (torch.zeros(3, 4), _WHOLE.t()[1:]),
        (torch.zeros(1).expand(4, 4), _WHOLE),
        (_WHOLE.int(), _WHOLE.int()),
        (_WHOLE.double(), _WHOLE.double()),
        (_WHOLE.to(torch.complex64), _WHOLE.to(torch.complex64)),
    ],
    ids=[
        "dtypes", "dtypes of equal bytes", "16 bits", "sizes", "inp strided", "out strided",
        "expanded", "int", "double", "complex",
    ],
)  # fmt: skip
def test_a_call_leaves_other_tensors_alone(
    all_reduce_call: Any, inp: torch.Tensor, out: torch.Tensor
) -> None:
    call, seen = all_reduce_call
    assert call(inp, out) == collectives.NOT_APPLICABLE
    assert seen() == [0] * 6


@pytest.mark.parametrize("arguments", [(_WHOLE, None), (3, _WHOLE), (_WHOLE,), ()])
def test_a_call_of_no_tensors_raises(all_reduce_call: Any, arguments: tuple[Any, ...]) -> None:
    call, seen = all_reduce_call
    with pytest.raises((TypeError, AttributeError)):
        call(*arguments)
    assert seen() == [0] * 6


def test_a_call_that_waits_lets_other_threads_run(
    library: collectives.Collectives, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native.python_module("_native_all_reduce") is None:
        pytest.skip("there is no native module")
    entered, leave = threading.Event(), threading.Event()

    def launch(handle: int, dtype: int, inp: int, out: int, nbytes: int, stream: int) -> int:
        entered.set()
        return 0 if leave.wait(30) else 1

    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    function = ctypes.CFUNCTYPE(number, size, number, pointer, pointer, size, pointer)(launch)
    address = ctypes.cast(function, pointer).value
    monkeypatch.setattr(library, "all_reduce_address", address)
    call = library.all_reduce_call(1, torch.empty(1))
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(call(_WHOLE, _WHOLE)))
    thread.start()
    assert entered.wait(30)
    leave.set()
    thread.join(30)
    assert statuses == [0]


@pytest.mark.parametrize(
    "kind",
    [CommTimeoutError, CommunicatorError, InvalidArgumentError],
    ids=lambda kind: kind.__name__,
)
def test_a_sentence_is_raised_as_the_class_that_it_begins_with(
    library: collectives.Collectives, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    sentence = f"{kind.__name__}: a sentence".encode()
    monkeypatch.setattr(library, "gpu_error", lambda: sentence)
    with pytest.raises(kind, match=r"^a sentence$") as caught:
        library.check(1)
    assert type(caught.value) is kind
    library.check(0)


def test_native_refusals_are_raised(library: collectives.Collectives) -> None:
    for refused in (
        lambda: library.create_custom_ar([1, 2, 3], 0, (1, 2, 3)),
        lambda: library.create_quick_ar([1, 2, 3], 0, 5),
        lambda: library.tune(1, "blocks", -1),
        lambda: library.quick_ar_set_launch(1, 9, 9, 9, 9),
        lambda: library.gpu_check(7),
    ):
        with pytest.raises(InvalidArgumentError, match=r"^a sentence$"):
            refused()
    library.tune(1, "blocks", 16)
    library.quick_ar_set_launch(1, 1, 2, 3, 4)
    library.gpu_check(1)
    assert library.quick_ar_all_reduce(1, 2, 15, None, None, 20, None) == 2
    assert library.captured(1) == (5, 77)
    assert [library.algorithm(1, nbytes) for nbytes in (9, 10)] == ["one_shot", "streamed"]


def test_every_exported_function_is_bound() -> None:
    """c_api.cu and the binding name the same functions."""
    text = (Path(__file__).parents[2] / "native/collectives/c_api.cu").read_text()
    exported = re.findall(r"^EXPORTED .*?\bcommunicators_(\w+)\(", text, re.MULTILINE)
    assert sorted(exported) == sorted(collectives._FUNCTIONS)
    assert set(collectives._FUNCTIONS) <= set(collectives.Collectives.__annotations__)


def _open(world_size: int, verdict: Verdict | None, device: Any = "cuda:0") -> list[Any]:
    return run_ranks(world_size, lambda group: CustomAllreduce(group, device, verdict=verdict))


def test_world_sizes() -> None:
    for comm in _open(3, None):
        assert str(comm.refusal) == "world size 3 is not one of 2, 4, 6, 8"
        assert comm.disabled
        assert not comm.should_custom_ar(torch.ones(4))
        assert comm.custom_all_reduce(torch.ones(4)) is None
        with pytest.raises(RefusedError, match="world size 3"):
            comm.all_reduce(torch.ones(4))
        comm.close()
        comm.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_cuda_it_refuses() -> None:
    for comm in _open(2, _ALLOWED):
        assert isinstance(comm.refusal, Refusal)
        assert "no CUDA device" in str(comm.refusal)


def test_the_device_needs_an_ordinal() -> None:
    for device in ("cpu", "cuda"):
        assert all(isinstance(e, InvalidArgumentError) for e in _open(2, _ALLOWED, device))


def test_nothing_is_registered() -> None:
    assert allreduce.get_graph_buffer_ipc_meta(1) == ([], [])
    allreduce.register_graph_buffers(1, [[], []], [[], []])
    allreduce.register_buffer(1, [10, 20])
    with pytest.raises(InvalidArgumentError, match="those are empty"):
        allreduce.register_graph_buffers(1, [[7], []], [[0], []])


def test_handles_have_64_bytes() -> None:
    assert allreduce._as_bytes("\x01" * 64) == b"\x01" * 64
    assert allreduce._as_bytes(torch.arange(64, dtype=torch.uint8)) == bytes(range(64))
    with pytest.raises(InvalidArgumentError, match="got 3"):
        allreduce._as_bytes(b"abc")
    with pytest.raises(InvalidArgumentError, match="zeros are expected"):
        allreduce._need_zero([0, 16])
    with pytest.raises(InvalidArgumentError, match="allocate_meta_buffer"):
        allreduce.get_meta_buffer_ipc_handle(torch.ones(4))


def test_more_than_two_need_full_nvlink(
    library: collectives.Collectives, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collectives, "load", lambda: library)
    data = torch.empty(0, dtype=torch.uint8)
    with pytest.raises(InvalidArgumentError, match="4 GPUs need full NVLink"):
        allreduce.init_custom_ar([1, 2, 3, 4], data, 0, False)
    assert allreduce.init_custom_ar([10, 20], data, 0, False) == 11
    assert allreduce.meta_size() == 65536 + 2 * sum(LAYOUT)


def test_the_seeds_names_are_there() -> None:
    names = (
        "init_custom_ar all_reduce dispose get_graph_buffer_ipc_meta register_buffer "
        "register_graph_buffers meta_size all_reduce_reg all_reduce_unreg "
        "deterministic_all_reduce_reg deterministic_all_reduce_unreg allocate_meta_buffer "
        "get_meta_buffer_ipc_handle allocate_shared_buffer_and_handle open_mem_handle "
        "free_shared_buffer init_custom_qr qr_get_handle qr_open_handles qr_all_reduce "
        "qr_destroy qr_max_size mscclpp_generate_unique_id mscclpp_init_context mscclpp_allreduce"
    )
    assert set(names.split()) <= set(allreduce.__all__)
