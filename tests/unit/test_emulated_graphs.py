"""Graphs that recorded calls of the collectives, through the C interface that Python calls.

The host side and the kernels are compiled for the CPU (emulated_gpu/), with streams that can be
captured and graphs that retain user objects as CUDA's do. tests/gpu/test_graphs.py does the same on
a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import random
import shutil
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from communicators import (
    CommMismatchError,
    CommTimeoutError,
    Group,
    InvalidArgumentError,
    Settings,
)
from communicators.backends.custom_all_reduce import CustomAllreduce
from communicators.bindings import collectives
from communicators.bindings.collectives import Collectives
from communicators.bindings.workspace import SharedBuffer
from tests.threads import run_ranks

_HERE = Path(__file__).parent / "emulated_gpu"
_NATIVE = Path(__file__).parents[2] / "native/collectives"
_SOURCES = [
    _HERE / "graphs.cpp",
    *(_NATIVE / f"{name}.cu" for name in (
        "communicator", "custom_all_reduce", "c_api", "meet", "all_reduce_one_shot",
        "all_reduce_two_shot", "all_gather", "quick_host", "quick_all_reduce",
    )),
]  # fmt: skip
LAYOUT = (32768, 8192, 8192)
F32, BF16 = (collectives.DTYPES[dtype] for dtype in (torch.float32, torch.bfloat16))
WORLD = 2


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    directory = tmp_path_factory.mktemp("emulated")

    def compiled(source: Path) -> str:
        target = directory / f"{source.stem}.o"
        command = [
            "c++", "-std=c++20", "-O0", "-fPIC", "-pthread", "-DCOMMUNICATORS_BLOCK_THREADS=32",
            f"-I{_HERE}", f"-I{_NATIVE.parent}", "-x", "c++", "-c", str(source), "-o", str(target),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, _SOURCES))
    target = directory / "emulated.so"
    link = ["c++", "-shared", "-pthread", "-Wl,-z,defs", *objects, "-o", str(target)]
    subprocess.run(link, check=True)
    return str(target)


class Ranks:
    """Two ranks on the emulated GPU, a stream each."""

    nbytes: Callable[[], int]
    create: Callable[[int], int]

    def __init__(self, path: str) -> None:
        self.library = Collectives(path)
        self.emulated = ctypes.CDLL(path)
        for name in ("stream", "end_capture"):
            getattr(self.emulated, f"emulated_{name}").restype = ctypes.c_void_p
        self.memory = [torch.zeros(self.nbytes() + 128, dtype=torch.uint8) for _ in range(WORLD)]
        self.pointers = [(each.data_ptr() + 127) // 128 * 128 for each in self.memory]
        self.handles = [self.create(rank) for rank in range(WORLD)]
        for handle in self.handles:
            self.library.gpu_set_timeout_ns(handle, 30_000_000_000)
        self.streams = [self.emulated.emulated_stream() for _ in range(WORLD)]

    def capture(self, rank: int, body: Callable[[int], None]) -> int:
        """The graph of what body(stream) launches."""
        stream = ctypes.c_void_p(self.streams[rank])
        self.emulated.emulated_begin_capture(stream)
        body(self.streams[rank])
        graph: int = self.emulated.emulated_end_capture(stream)
        return graph

    def together(self, body: Callable[[int], None]) -> None:
        """body(rank), each on a thread."""
        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(WORLD)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        for handle in self.handles:
            self.library.gpu_check(handle)

    def replay(self, graphs: list[int]) -> None:
        self.together(lambda rank: self.emulated.emulated_replay(ctypes.c_void_p(graphs[rank])))

    def destroy(self, graphs: list[int]) -> None:
        for graph in graphs:
            self.emulated.emulated_destroy_graph(ctypes.c_void_p(graph))

    def graphs(self) -> list[int]:
        return [self.library.graphs(handle) for handle in self.handles]


class Exact(Ranks):
    def nbytes(self) -> int:
        return int(self.library.custom_ar_bytes(*LAYOUT))

    def create(self, rank: int) -> int:
        handle = self.library.create_custom_ar(self.pointers, rank, LAYOUT)
        for name in ("blocks", "other_blocks"):
            self.library.tune(handle, name, 1)
        return handle

    def call(self, op: str, rank: int, inp: torch.Tensor, out: torch.Tensor, stream: int) -> None:
        handle, at = self.handles[rank], (inp.data_ptr(), out.data_ptr())
        library = self.library
        library.check(
            library.custom_ar_all_gather(handle, *at, inp.nbytes, stream)
            if op == "all_gather"
            else library.custom_ar_reduce_scatter(handle, F32, *at, out.nbytes, stream)
            if op == "reduce_scatter"
            else library.custom_ar_all_reduce(handle, F32, *at, inp.nbytes, stream)
        )


class Quick(Ranks):
    AREA = 64 << 10

    def nbytes(self) -> int:
        return int(self.library.quick_ar_bytes(self.AREA))

    def create(self, rank: int) -> int:
        handle = self.library.create_quick_ar(self.pointers, rank, self.AREA)
        self.library.quick_ar_set_launch(handle, 1, 32, 1, 0)
        return handle

    def call(self, op: str, rank: int, inp: torch.Tensor, out: torch.Tensor, stream: int) -> None:
        at = (inp.data_ptr(), out.data_ptr())
        self.library.check(
            self.library.quick_ar_all_reduce(self.handles[rank], 0, BF16, *at, inp.nbytes, stream)
        )


KINDS: list[Any] = [Exact, Quick]


class Captured:
    """One graph a rank of one or more all-reduces, and what belongs to it."""

    def __init__(self, ranks: Any, count: int, calls: int = 1) -> None:
        self.ranks = ranks
        dtype = torch.bfloat16 if isinstance(ranks, Quick) else torch.float32
        self.inputs = [torch.zeros(count, dtype=dtype) for _ in range(WORLD)]
        self.outputs = [torch.full((count,), -1.0, dtype=dtype) for _ in range(WORLD)]
        self.graphs = [self._capture(rank, calls) for rank in range(WORLD)]

    def _capture(self, rank: int, calls: int) -> int:
        def body(stream: int) -> None:
            for _ in range(calls):
                self.ranks.call("all_reduce", rank, self.inputs[rank], self.outputs[rank], stream)

        return self.ranks.capture(rank, body)

    def check_replay(self, value: int) -> None:
        for rank in range(WORLD):
            self.inputs[rank].fill_(value * (rank + 1))
            self.outputs[rank].fill_(-1)
        self.ranks.replay(self.graphs)
        assert all((out == 3 * value).all() for out in self.outputs)

    def destroy(self) -> None:
        self.ranks.destroy(self.graphs)


@pytest.mark.parametrize("op", ["all_reduce", "all_gather", "reduce_scatter"])
def test_a_recorded_call_is_noted_wherever_it_is_captured(path: str, op: str) -> None:
    ranks = Exact(path)
    assert ranks.graphs() == [0, 0]
    assert ranks.library.captured(ranks.handles[0]) == (0, 0)
    whole = [torch.ones(64) for _ in range(WORLD)]
    half = [torch.zeros(32) for _ in range(WORLD)]
    inp, out = (half, whole) if op == "all_gather" else (whole, half)
    out = whole if op == "all_reduce" else out
    graphs = [
        ranks.capture(r, functools.partial(ranks.call, op, r, inp[r], out[r])) for r in range(WORLD)
    ]
    assert ranks.graphs() == [1, 1]
    found = [ranks.library.captured(handle) for handle in ranks.handles]
    assert found[0] == found[1] and found[0][0] == 1
    assert ranks.library.captured(ranks.handles[0]) == (0, 0), "since it was asked last"
    ranks.replay(graphs)
    ranks.together(lambda rank: ranks.call(op, rank, inp[rank], out[rank], 0))
    assert ranks.graphs() == [1, 1] and ranks.library.captured(ranks.handles[0]) == (0, 0)
    ranks.destroy(graphs)
    assert ranks.graphs() == [0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_recorded_is_told_apart(path: str, kind: Any) -> None:
    ranks = kind(path)
    seen = set()
    for count, calls in ((64, 1), (64, 2), (128, 1)):
        Captured(ranks, count, calls).destroy()
        found = [ranks.library.captured(handle) for handle in ranks.handles]
        assert found[0] == found[1] and found[0][0] == calls
        seen.add(found[0])
    assert len(seen) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_in_any_order_of_replay_and_destruction(path: str, kind: Any) -> None:
    ranks, order = kind(path), random.Random(5)
    alive: list[Captured] = []
    for turn in range(14):
        kept = order.random()
        if not alive or (kept < 0.3 and len(alive) < 5):
            alive.append(Captured(ranks, order.choice((8, 64, 100)), order.choice((1, 3))))
        elif kept < 0.45:
            alive.pop(order.randrange(len(alive))).destroy()
        else:
            order.choice(alive).check_replay(turn + 1)
        assert ranks.graphs() == [len(alive)] * WORLD
    while alive:
        alive.pop(order.randrange(len(alive))).destroy()
    assert ranks.graphs() == [0, 0]


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("no_device")
def test_what_a_graph_reads_outlives_the_end(path: str, kind: Any) -> None:
    ranks = kind(path)
    device, freed = torch.device("cpu"), []
    graphs = [Captured(ranks, 64), Captured(ranks, 32)]
    graphs[0].check_replay(1)
    for rank, handle in enumerate(ranks.handles):
        ranks.library.end(handle, device, lambda rank=rank: freed.append(rank))
    for graph in graphs:  # they end at once and leave their outputs as they were
        for out in graph.outputs:
            out.fill_(-7)
        for each in graph.graphs:
            ranks.emulated.emulated_replay(ctypes.c_void_p(each))
        assert all((out == -7).all() for out in graph.outputs)
    graphs[0].destroy()
    ranks.library.reclaim()
    assert freed == [], "the other graph may still be replayed"
    ranks.library.free(ranks.pointers[:1], lambda: freed.append("the caller's"))
    ranks.library.free([1], lambda: freed.append("another"))
    assert freed == ["another"]
    ranks.destroy(graphs[1].graphs[1:])
    ranks.library.reclaim()
    assert freed == ["another", 1]
    ranks.destroy(graphs[1].graphs[:1])
    ranks.library.reclaim()
    assert freed == ["another", 1, 0, "the caller's"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("no_device")
def test_without_a_graph_the_end_gives_back_at_once(path: str, kind: Any) -> None:
    ranks, freed = kind(path), []
    Captured(ranks, 64).destroy()
    ranks.library.end(ranks.handles[0], torch.device("cpu"), lambda: freed.append(True))
    assert freed == [True]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("no_device")
def test_a_handle_that_is_not_open_is_refused(path: str, kind: Any) -> None:
    ranks, x = kind(path), torch.ones(64)
    library = ranks.library
    other = (Quick if kind is Exact else Exact)(path).handles[0]
    ranks.library.end(ranks.handles[1], torch.device("cpu"))
    assert ranks.create(1) not in (*ranks.handles, other), "no number is given out twice"
    for handle in (ranks.handles[1], 0, -1, 2**62, other):
        ranks.handles[1] = handle
        with pytest.raises(InvalidArgumentError, match=rf"^{handle} is no .*handle"):
            ranks.call("all_reduce", 1, x, x, ranks.streams[1])
        calls = [getattr(library, f"gpu_{name}") for name in ("check", "destroy", "retire")]
        calls += [library.captured, library.graphs, lambda one: library.end(one, "cpu")]
        for call in calls if handle != other else []:
            with pytest.raises(InvalidArgumentError, match=rf"^{handle} is no open handle"):
                call(handle)


@pytest.mark.parametrize("kind", KINDS)
def test_a_late_peer_is_the_documented_error(path: str, kind: Any) -> None:
    ranks, x = kind(path), torch.ones(64)
    for handle in ranks.handles:
        ranks.library.gpu_set_timeout_ns(handle, 50_000_000)
    for _ in range(2):  # what is reported stays
        with pytest.raises(CommTimeoutError, match=r"on rank 0 of 2 waited .* s for rank 1"):
            ranks.call("all_reduce", 0, x, x, 0)
            ranks.library.gpu_check(ranks.handles[0])


def _communicator(group: Group, ranks: Exact) -> CustomAllreduce:
    """A live one over emulated workspaces."""
    comm = object.__new__(CustomAllreduce)
    comm.group, comm.device, comm.settings = group, torch.device("cuda:0"), Settings()
    comm.refusal, comm._closed, comm._fast = None, False, None
    comm._library, comm._handle = ranks.library, ranks.handles[group.rank]
    comm._buffer = SharedBuffer(0, comm.device, group.rank, b"", 0)
    return comm


def _captures(path: str, counts: list[list[int]], fails: bool = False) -> list[Any]:
    """What capture() does on each rank, which captures an all-reduce of each of its sizes."""
    ranks = Exact(path)

    def body(group: Group) -> Any:
        comm, x = _communicator(group, ranks), torch.ones(64)

        def calls(stream: int) -> None:
            for count in counts[group.rank]:
                ranks.call("all_reduce", group.rank, x[:count], x[:count], stream)

        try:
            if fails:
                with pytest.raises(ZeroDivisionError), comm.capture():
                    ranks.capture(group.rank, calls) if group.rank else None
                    raise ZeroDivisionError
                counts[:] = [[8]] * WORLD
            with comm.capture():
                ranks.capture(group.rank, calls)
            ranks.capture(group.rank, calls)  # outside: compared by the next one
            comm.register_graph_buffers()
        finally:
            comm._handle = 0  # nothing to close
        return "the same"

    return run_ranks(WORLD, body)


def test_ranks_that_capture_alike_pass(path: str) -> None:
    assert _captures(path, [[8, 64], [8, 64]]) == ["the same"] * WORLD
    assert _captures(path, [[8], [8]], fails=True) == ["the same"] * WORLD


@pytest.mark.parametrize(
    ("counts", "differ"),
    [
        ([[8], []], r"numbers of calls \(rank 0: 1, rank 1: 0\)"),
        ([[8], [8, 8]], r"numbers of calls \(rank 0: 1, rank 1: 2\)"),
        ([[8], [16]], "different calls"),
        ([[8, 16], [16, 8]], "different calls"),
    ],
)
def test_a_graph_of_one_rank_alone_is_an_error_of_all(
    path: str, counts: list[list[int]], differ: str
) -> None:
    for error in _captures(path, counts):
        with pytest.raises(CommMismatchError, match=differ):
            raise error


@pytest.mark.usefixtures("no_device")
def test_close_keeps_what_a_graph_reads(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, closed = Exact(path), []
    monkeypatch.setattr(SharedBuffer, "close", lambda buffer: closed.append(buffer.rank))
    graph = Captured(ranks, 16)  # by no capture() of the communicator

    def body(group: Group) -> None:
        comm = _communicator(group, ranks)
        comm.close()
        comm.close()

    assert run_ranks(WORLD, body) == [None] * WORLD
    ranks.library.reclaim()
    assert closed == []
    graph.destroy()
    monkeypatch.setattr(collectives, "load", lambda: ranks.library)
    freed = SharedBuffer(0, torch.device("cpu"), 0, b"", 0)
    ranks.library.free([1], freed.close)  # whatever comes next gives back what was kept
    assert sorted(closed) == [0, 0, 1]
