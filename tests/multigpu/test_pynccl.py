"""PyNcclCommunicator, windows and the NCCL allocator on two real GPUs."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest
import torch
from torch.distributed import ReduceOp

from communicators.backends.nccl.pynccl import PyNcclCommunicator
from communicators.bindings import pynccl_allocator
from communicators.bindings.pynccl_allocator import set_graph_pool_id, use_symmetric_memory
from communicators.errors import CommunicatorError, RefusedError
from communicators.groups.stateless import StatelessProcessGroup
from tests.ranks import Rank, pool, run_fresh

pytestmark = [
    pytest.mark.multigpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

W = 2
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.uint8)


def opened(rank: Rank) -> PyNcclCommunicator:
    """The communicator of this process, made once."""
    if "pynccl" not in rank.cache:
        torch.cuda.set_device(rank.rank)
        rank.cache["pynccl"] = PyNcclCommunicator(rank.group(timeout_s=60.0), rank.rank)
    comm: PyNcclCommunicator = rank.cache["pynccl"]
    assert comm.refusal is None, comm.refusal
    return comm


def values(rank: int, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Small whole numbers, whose sums are exact in every dtype."""
    return ((torch.arange(n, device="cuda") * 7 + rank * 3) % 16).to(dtype)


def _every_op(rank: Rank) -> str:
    comm, me = opened(rank), rank.rank
    for dtype in DTYPES:
        for n in (2, 1000, 1 << 20):
            total = values(0, n, dtype) + values(1, n, dtype)
            mine, out = values(me, n, dtype), torch.empty(n, dtype=dtype, device="cuda")
            comm.run("all_reduce", out, mine)
            assert torch.equal(out, total) and torch.equal(mine, values(me, n, dtype))
            comm.run("all_reduce", mine, mine)
            assert torch.equal(mine, total)
            part = torch.empty(n // W, dtype=dtype, device="cuda")
            comm.run("reduce_scatter", part, values(me, n, dtype))
            assert torch.equal(part, total.view(W, -1)[me])
            whole = torch.empty(W * n, dtype=dtype, device="cuda")
            both = torch.cat([values(0, n, dtype), values(1, n, dtype)])
            comm.run("all_gather", whole, values(me, n, dtype))
            assert torch.equal(whole, both)
            whole.zero_()
            comm.run("gather", whole if me == 1 else None, values(me, n, dtype), 1)
            assert torch.equal(whole, both if me == 1 else torch.zeros_like(both))
            x = values(me, n, dtype)
            comm.run("broadcast", x, x, 1)
            assert torch.equal(x, values(1, n, dtype))
            comm.group_start()
            comm.send(values(me, n, dtype), 1 - me)
            comm.recv(x, 1 - me)
            comm.group_end()
            assert torch.equal(x, values(1 - me, n, dtype))
    y = values(me, 8)
    comm.all_reduce_(y, ReduceOp.MAX)
    assert torch.equal(y, torch.maximum(values(0, 8), values(1, 8)))
    comm.wait(10)
    assert comm.nccl is not None
    return comm.nccl.ncclGetVersion()


def test_every_op_dtype_and_size() -> None:
    versions = pool(W).run(_every_op)
    assert versions == [".".join(map(str, torch.cuda.nccl.version()))] * W


def _ragged(rank: Rank, sizes: list[int]) -> None:
    comm, me = opened(rank), rank.rank

    def rows(r: int) -> torch.Tensor:
        return torch.full((sizes[r], 8), r + 1.0, device="cuda")

    whole = torch.zeros(sum(sizes), 8, device="cuda")
    comm.all_gather(whole, rows(me), sizes=sizes)
    assert torch.equal(whole, torch.cat([rows(0), rows(1)]))
    part = torch.zeros(sizes[me], 8, device="cuda")
    comm.reduce_scatter(part, whole.clone(), sizes=sizes)
    assert torch.equal(part, 2 * rows(me))


@pytest.mark.parametrize("sizes", [[3, 5], [0, 4], [7, 0]])
def test_ragged_parts(sizes: list[int]) -> None:
    pool(W).run(_ragged, sizes)


def _fp8(rank: Rank) -> None:
    comm = opened(rank)
    assert comm.capabilities is not None and comm.capabilities.dtypes is not None
    if torch.float8_e4m3fn in comm.capabilities.dtypes:
        x = torch.full((64,), rank.rank + 1.0, device="cuda").to(torch.float8_e4m3fn)
        comm.all_reduce_(x)
        assert torch.equal(x.float(), torch.full((64,), 3.0, device="cuda"))


def test_fp8() -> None:
    pool(W).run(_fp8)


def _graph(rank: Rank) -> tuple[float, bool, bool]:
    torch.cuda.set_device(rank.rank)
    comm = PyNcclCommunicator(rank.group("graph", timeout_s=20.0), rank.rank)
    assert comm.refusal is None, comm.refusal
    x, out = values(rank.rank, 4096), torch.empty(4096, device="cuda")
    part, whole = torch.empty(2048, device="cuda"), torch.empty(8192, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        comm.run("all_reduce", out, x)
        comm.run("reduce_scatter", part, out)
        comm.run("all_gather", whole, out)
    eager = torch.empty(4096, device="cuda")
    for step in range(50):
        x.copy_(values(rank.rank, 4096) + step)
        graph.replay()
        comm.run("all_reduce", eager, x)
        total = values(0, 4096) + values(1, 4096) + 2 * step
        assert torch.equal(out, total) and torch.equal(eager, total), step
        assert torch.equal(part, 2 * total.view(2, -1)[rank.rank])
        assert torch.equal(whole, total.repeat(2))
    comm.wait(10)
    started = time.monotonic()
    comm.close()  # while the graph is alive
    seconds = time.monotonic() - started
    kept = _destroying()
    del graph
    ended = time.monotonic() + 10
    while _destroying() and time.monotonic() < ended:
        time.sleep(0.05)
    return seconds, kept, _destroying()


def _destroying() -> bool:
    return any(thread.name == "ncclCommDestroy" for thread in threading.enumerate())


def test_graphs_replay_beside_eager_calls_and_keep_the_communicator() -> None:
    outcomes = run_fresh(W, _graph, deadline_s=60)
    assert [o.trace for o in outcomes] == ["", ""]
    for seconds, kept_by_graph, kept_after in (o.value for o in outcomes):
        assert seconds < 5 and kept_by_graph and not kept_after


def _streams(rank: Rank) -> None:
    comm = opened(rank)
    side = torch.cuda.Stream()
    x = values(rank.rank, 1 << 20)
    total = values(0, 1 << 20) + values(1, 1 << 20)
    side.wait_stream(torch.cuda.current_stream())
    with comm.change_state(enable=True, stream=side):
        comm.all_reduce_(x)
    event = torch.cuda.Event()
    event.record(side)
    event.synchronize()
    assert torch.equal(x, total)
    with comm.change_state(enable=False), pytest.raises(RefusedError):
        comm.all_reduce(x)


def test_streams() -> None:
    pool(W).run(_streams)


def _stateless(rank: Rank) -> None:
    torch.cuda.set_device(rank.rank)
    store = rank.store()
    port = 0
    if rank.rank == 1:
        port = int(store.get("stateless port"))
    if rank.rank == 0:
        import socket

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        store.set("stateless port", str(port))
    group = StatelessProcessGroup.create("127.0.0.1", port, rank.rank, W)
    comm = PyNcclCommunicator(group, f"cuda:{rank.rank}")
    assert comm.refusal is None and not torch.distributed.is_initialized()
    x = torch.ones(100, device="cuda")
    assert torch.equal(comm.all_reduce_(x), torch.full((100,), 2.0, device="cuda"))
    comm.close()
    group.close()


def test_without_torch_distributed() -> None:
    pool(W).run(_stateless)


def _symmetric(rank: Rank) -> list[int]:
    comm = opened(rank)
    with use_symmetric_memory(comm) as symmetric:
        x = values(rank.rank, 1 << 16).clone()
        y = torch.empty(1 << 16, device="cuda")
        symmetric.tag(x)
    outside = torch.empty(1 << 16, device="cuda")
    pool_ = pynccl_allocator.get_nccl_mem_pool()

    def inside(tensor: torch.Tensor) -> bool:
        return any(
            0 <= tensor.data_ptr() - one["address"] < one["total_size"] for one in pool_.snapshot()
        )

    assert inside(x) and inside(y) and not inside(outside)
    windows = dict(comm.windows)
    assert windows and set(windows) == {one["address"] for one in pool_.snapshot()}
    with use_symmetric_memory(comm):
        z = torch.empty(64, device="cuda")
    assert inside(z) and comm.windows == windows  # registered once
    total = values(0, 1 << 16) + values(1, 1 << 16)
    comm.run("all_reduce", y, x)
    assert torch.equal(y, total)

    with pytest.raises(RefusedError, match="set_graph_pool_id"):
        _capture_symmetric(comm, None)
    set_graph_pool_id(None)
    graph = torch.cuda.CUDAGraph()
    big = _capture_symmetric(comm, graph)
    graph.replay()
    assert inside(big[0]) and not inside(big[1])
    assert torch.equal(big[0], torch.full_like(big[0], 2.0))
    assert torch.equal(big[1], torch.full_like(big[1], 3.0))
    comm.wait(10)
    return sorted(one["total_size"] for one in pool_.snapshot())


def _capture_symmetric(comm: PyNcclCommunicator, graph: Any) -> tuple[torch.Tensor, torch.Tensor]:
    tell = graph is not None
    graph = graph or torch.cuda.CUDAGraph()
    handle = torch.cuda.graph_pool_handle()
    with torch.cuda.graph(graph, pool=handle):
        if tell:
            set_graph_pool_id(handle)
        with use_symmetric_memory(comm):
            x = torch.ones(32 << 20, device="cuda")  # more than the pool has: a new segment
        comm.run("all_reduce", x, x)
        after = x[:1000] + 1  # from the graph's own pool again
    return x, after


def test_tensors_from_nccls_allocator_are_registered() -> None:
    sizes = pool(W).run(_symmetric)
    assert sizes[0] == sizes[1]


def _duplicate(rank: Rank) -> str:
    torch.cuda.set_device(0)
    return str(PyNcclCommunicator(rank.group("duplicate"), "cuda:0").refusal)


def test_one_gpu_for_two_ranks_is_a_refusal() -> None:
    reasons = pool(W).run(_duplicate)
    assert reasons[0] == reasons[1] and "rank 0 and 1 are both on GPU-" in reasons[0]


def _peer_dies(rank: Rank, how: str) -> tuple[str, float]:
    torch.cuda.set_device(rank.rank)
    comm = PyNcclCommunicator(rank.group("dies", timeout_s=30.0), rank.rank)
    x = torch.ones(1 << 20, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        comm.all_reduce_(x)
    if rank.rank == 1:
        time.sleep(1.0)
        os._exit(1)  # while rank 0 is in its collective
    started = time.monotonic()
    try:
        if how == "graph":
            graph.replay()
        else:
            comm.all_reduce_(x)
        if how == "wait":
            comm.wait(25.0)
        else:
            torch.cuda.synchronize()  # knows no deadline: the abort must end the kernel
            comm.all_reduce(x)
        return "no error", 0.0
    except CommunicatorError as error:
        found = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - started
    assert comm.disabled
    del graph
    comm.close()
    y = torch.ones(4, device="cuda") + 1  # the CUDA context is alive
    assert torch.equal(y.cpu(), torch.full((4,), 2.0))
    return found, seconds


@pytest.mark.parametrize("how", ["wait", "synchronize", "graph"])
def test_a_dead_peer_is_an_error_at_once_and_cuda_lives_on(how: str) -> None:
    survivor, dead = run_fresh(W, _peer_dies, how, deadline_s=60)
    assert dead.killed and survivor.trace == ""
    found, seconds = survivor.value
    assert found.startswith("PeerDiedError: NCCL on rank 0 is unusable: the process of rank 1")
    assert seconds < 10


def _late_peer(rank: Rank) -> tuple[str, float]:
    torch.cuda.set_device(rank.rank)
    group = rank.group("late", timeout_s=30.0)
    comm = PyNcclCommunicator(group, rank.rank)
    found, started = "", time.monotonic()
    if rank.rank == 0:
        comm.all_reduce(torch.ones(1 << 20, device="cuda"))
        try:
            comm.wait(2.0)
        except CommunicatorError as error:
            found = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - started
    group.barrier()
    comm.close()
    return found, seconds


def test_a_late_peer_is_an_error_within_the_deadline() -> None:
    outcomes = run_fresh(W, _late_peer, deadline_s=60)
    assert [o.trace for o in outcomes] == ["", ""]
    found, seconds = outcomes[0].value
    assert found.startswith("CommTimeoutError: NCCL on rank 0 of 2 waited 2 s") and seconds < 12


def _cycles(rank: Rank) -> int:
    torch.cuda.set_device(rank.rank)
    free = 0
    for cycle in range(12):
        group = rank.group(f"cycle {cycle}")
        comm = PyNcclCommunicator(group, rank.rank)
        assert comm.refusal is None
        comm.close()
        torch.cuda.synchronize()
        group.barrier()  # what a peer has mapped is freed when it lets go, too
        if cycle == 1:  # the first ones allocate what the process keeps
            free = torch.cuda.mem_get_info()[0]
        group.barrier()
    return free - torch.cuda.mem_get_info()[0]


def test_opening_and_closing_keeps_no_memory() -> None:
    outcomes = run_fresh(W, _cycles, deadline_s=90)
    assert [o.trace for o in outcomes] == ["", ""]
    assert max(o.value for o in outcomes) < 16 << 20, [o.value for o in outcomes]
