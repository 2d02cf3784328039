"""backends/pynccl.py over a fake NCCL: the ranks are threads and the tensors are in host memory."""

from __future__ import annotations

import ctypes
import dataclasses
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from communicators import Group
from communicators.backends.nccl import comm as nccl_comm
from communicators.backends.nccl.checks import NcclHandle, check_handles
from communicators.backends.nccl.peer_watch import own_process
from communicators.backends.nccl.pynccl import PyNcclCommunicator
from communicators.base import Capability, Request
from communicators.bindings.pynccl_wrapper import NcclError
from communicators.errors import (
    CommMismatchError,
    CommTimeoutError,
    CommunicatorError,
    InvalidArgumentError,
    PeerDiedError,
    RefusedError,
)
from tests.threads import run_ranks
from tests.unit.fakes import compile_fake

pytestmark = pytest.mark.filterwarnings("error")


class HostNccl(PyNcclCommunicator):
    """On tensors in host memory, which the fake NCCL takes."""

    device_type = "cpu"


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compile_fake("nccl", tmp_path_factory.mktemp("lib") / "libfake_nccl.so")


@pytest.fixture
def calls(fake: str) -> Callable[[], list[str]]:
    library = ctypes.CDLL(fake)
    library.fake_nccl_calls.restype = ctypes.c_char_p
    library.fake_nccl_reset()
    return lambda: library.fake_nccl_calls().decode().split()


def on_ranks(
    fake: str, world_size: int, body: Callable[[HostNccl, int], Any], timeout_s: float = 15.0
) -> list[Any]:
    """body(communicator, rank) on each rank; errors are raised here."""

    def rank_body(group: Group) -> Any:
        comm = HostNccl(group, "cpu", fake)
        assert comm.refusal is None, comm.refusal
        try:
            return body(comm, group.rank)
        finally:
            comm.close()

    results = run_ranks(world_size, rank_body, timeout_s)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def ramp(rank: int, n: int) -> torch.Tensor:
    return torch.arange(n, dtype=torch.float32) + 100 * rank


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_verb(fake: str, world_size: int) -> None:
    total = torch.stack([ramp(rank, 4 * world_size) for rank in range(world_size)]).sum(0)

    def body(comm: HostNccl, rank: int) -> None:
        mine = ramp(rank, 4 * world_size)
        out = torch.empty_like(mine)
        comm.run("all_reduce", out, mine)
        assert torch.equal(out, total) and torch.equal(mine, ramp(rank, 4 * world_size))
        comm.run("all_reduce", mine, mine)
        assert torch.equal(mine, total)

        part = torch.empty(4)
        comm.run("reduce_scatter", part, ramp(rank, 4 * world_size))
        assert torch.equal(part, total[4 * rank : 4 * rank + 4])

        gathered = torch.cat([ramp(r, 3) for r in range(world_size)]).to(torch.complex64)
        whole = torch.zeros(3 * world_size, dtype=torch.complex64)  # moved, whatever the dtype
        comm.run("all_gather", whole, ramp(rank, 3).to(torch.complex64))
        assert torch.equal(whole, gathered)

        root = world_size - 1
        whole = torch.zeros(3 * world_size)
        comm.run("gather", whole if rank == root else None, ramp(rank, 3), root)
        assert rank != root or torch.equal(whole, gathered.real)

        x = ramp(rank, 5)
        comm.run("broadcast", x, x, root)
        assert torch.equal(x, ramp(root, 5))

        empty = torch.empty(0)
        for op in ("all_reduce", "all_gather", "reduce_scatter", "broadcast"):
            comm.run(op, empty, empty)
        if world_size > 1 and rank < 2:
            if rank == 0:
                comm.run("send", None, ramp(7, 6), 1)
            else:
                got = torch.empty(6)
                comm.run("recv", got, None, 0)
                assert torch.equal(got, ramp(7, 6))

    on_ranks(fake, world_size, body)


@pytest.mark.parametrize("sizes", [[3, 1, 2], [0, 4, 0], [1, 1, 1]])
def test_ragged_parts(fake: str, sizes: list[int]) -> None:
    def rows(rank: int) -> torch.Tensor:
        return torch.full((sizes[rank], 2), float(rank))

    def body(comm: HostNccl, rank: int) -> None:
        whole = torch.full((sum(sizes), 2), -1.0)
        comm.all_gather(whole, rows(rank), sizes=sizes)
        assert torch.equal(whole, torch.cat([rows(r) for r in range(3)]))

        addend = torch.arange(2.0 * sum(sizes)).view(-1, 2) * (rank + 1)
        part = torch.full((sizes[rank], 2), -1.0)
        comm.reduce_scatter(part, addend, sizes=sizes)
        expected = torch.arange(2.0 * sum(sizes)).view(-1, 2) * 6
        assert torch.equal(part, expected.split(sizes)[rank])

    on_ranks(fake, 3, body)


def test_equal_parts_take_one_call_and_ragged_ones_a_group(
    fake: str, calls: Callable[[], list[str]]
) -> None:
    def body(comm: HostNccl, rank: int) -> None:
        comm.all_gather(torch.empty(4), torch.ones(2))
        comm.reduce_scatter(torch.empty(2), torch.ones(4))
        comm.all_gather(torch.empty(3), torch.ones(1 + rank), sizes=[1, 2])

    on_ranks(fake, 2, body)
    made = calls()
    assert made.count("ncclAllGather") == 2 and made.count("ncclReduceScatter") == 2
    assert made.count("ncclGroupStart") == made.count("ncclGroupEnd") == 2
    assert made.count("ncclBroadcast") == 4 and made.count("ncclCommDestroy") == 2
    assert made.count("ncclGetUniqueId") == 1 and "ncclCommAbort" not in made


def test_send_and_recv_cross_within_a_group(fake: str) -> None:
    def body(comm: HostNccl, rank: int) -> None:
        got = torch.empty(4)
        comm.group_start()
        comm.send(ramp(rank, 4), 1 - rank)
        comm.recv(got, 1 - rank)
        comm.group_end()
        assert torch.equal(got, ramp(1 - rank, 4))
        x = ramp(rank, 4)
        comm.broadcast(x, 1)
        assert torch.equal(x, ramp(1, 4))

    on_ranks(fake, 2, body)


def test_change_state_switches_for_a_scope(fake: str) -> None:
    def body(comm: HostNccl, rank: int) -> None:
        assert not comm.disabled
        with comm.change_state(enable=False):
            assert comm.disabled
            with pytest.raises(RefusedError, match="switched off by change_state on rank"):
                comm.all_reduce(torch.ones(1))
            with comm.change_state():
                assert not comm.disabled
            assert comm.disabled
        with pytest.raises(ZeroDivisionError), comm.change_state(enable=False):
            raise ZeroDivisionError
        assert not comm.disabled

    on_ranks(fake, 2, body)


def test_windows_are_registered_once_and_end_with_the_communicator(
    fake: str, calls: Callable[[], list[str]]
) -> None:
    def body(comm: HostNccl, rank: int) -> None:
        memory = torch.empty(64)
        window = comm.register_comm_window_raw(memory.data_ptr(), 256)
        assert comm.register_comm_window_raw(memory.data_ptr(), 256) is window
        other = comm.register_comm_window_raw(memory.data_ptr() + 128, 128)
        comm.deregister_comm_window(window)
        assert other is not window

    on_ranks(fake, 2, body)
    made = calls()
    assert made.count("ncclCommWindowRegister") == made.count("ncclCommWindowDeregister") == 4


def test_what_it_takes(fake: str) -> None:
    (capability,) = on_ranks(fake, 1, lambda comm, rank: comm.capabilities)
    assert isinstance(capability, Capability) and not capability.deterministic
    for mode in ("eager", "capture"):
        assert capability.refuses(Request("all_reduce", torch.bfloat16, 6, mode)) is None
    refusal = capability.refuses(Request("all_reduce", torch.complex64, 8))
    assert refusal is not None and "complex64" in str(refusal)
    assert capability.refuses(Request("all_gather", torch.complex64, 8)) is None


def test_wrong_tensors_are_refused_before_nccl_sees_them(
    fake: str, calls: Callable[[], list[str]]
) -> None:
    def body(comm: HostNccl, rank: int) -> None:
        before = len(calls())
        x = torch.ones(4, 4)
        with pytest.raises(InvalidArgumentError, match="must be contiguous"):
            comm.all_reduce(x.t()[:2])
        with pytest.raises(InvalidArgumentError, match="a tensor is on meta; this communicator"):
            comm.all_reduce(x.to("meta"))
        with pytest.raises(InvalidArgumentError, match=r"out_tensor is \(3,\)"):
            comm.all_reduce(torch.ones(4), torch.ones(3))
        with pytest.raises(InvalidArgumentError, match="1 ranks need exactly 1 parts"):
            comm.all_gather(torch.ones(5), torch.ones(4))
        with pytest.raises(InvalidArgumentError, match=r"sizes=\[1, 3\] on rank 0 of 1"):
            comm.all_gather(torch.ones(4), torch.ones(4), sizes=[1, 3])
        with pytest.raises(InvalidArgumentError, match="do not fit"):
            comm.reduce_scatter(torch.ones(2), torch.ones(4), sizes=[4])
        with pytest.raises(InvalidArgumentError, match="no data type for"):
            comm.all_reduce(torch.ones(2, dtype=torch.complex64))
        with pytest.raises(InvalidArgumentError, match="'shuffle' is not one of all_reduce"):
            comm.run("shuffle", x, x)
        assert len(calls()) == before and not comm.disabled

    on_ranks(fake, 1, body)


def test_an_nccl_error_names_op_and_rank_and_ends_the_communicator(
    fake: str, calls: Callable[[], list[str]]
) -> None:
    def body(comm: HostNccl, rank: int) -> None:
        ctypes.CDLL(fake).fake_nccl_fail(1)
        with pytest.raises(NcclError, match="all_reduce on rank 0: ncclAllReduce failed: unhand"):
            comm.all_reduce(torch.ones(1))
        assert comm.disabled
        with pytest.raises(RefusedError, match="unusable: all_reduce failed"):
            comm.all_reduce(torch.ones(1))

    on_ranks(fake, 1, body)
    assert calls()[-1] == "ncclCommAbort" and "ncclCommDestroy" not in calls()


def test_close_and_abort_are_idempotent(fake: str, calls: Callable[[], list[str]]) -> None:
    def body(comm: HostNccl, rank: int) -> None:
        comm.destroy()
        comm.close()
        comm.abort()
        assert comm.disabled and comm.comm is None
        with pytest.raises(RefusedError, match="pynccl was closed on rank 0"):
            comm.all_reduce(torch.ones(1))

    on_ranks(fake, 1, body)
    assert calls().count("ncclCommDestroy") == 1 and "ncclCommAbort" not in calls()


def test_a_failure_in_the_background_is_found_by_check(fake: str) -> None:
    def body(comm: HostNccl, rank: int) -> None:
        assert comm._comm is not None and comm.nccl is not None and comm._comm._watch is not None
        comm._comm._watch.stop()
        comm._comm.check()
        comm.nccl.ncclCommDestroy(comm.comm)  # the fake answers "remote process exited" from now
        with pytest.raises(NcclError, match="remote process exited"):
            comm._comm.check()
        assert comm.disabled

    on_ranks(fake, 1, body)


def test_a_dead_peer_ends_the_communicator_at_once(
    fake: str, calls: Callable[[], list[str]]
) -> None:
    def body(comm: HostNccl, rank: int) -> None:
        assert comm._comm is not None and comm._comm._watch is not None
        comm._comm._watch.stop()
        abort = comm._comm.nccl.ncclCommAbort

        comm._comm.nccl.ncclCommAbort = lambda handle: (  # type: ignore[method-assign, assignment]
            time.sleep(0.3), abort(handle)  # close() waits for it
        )  # fmt: skip
        with subprocess.Popen(["sleep", "60"]) as peer:
            comm._comm.watch({1: peer.pid})
            comm.all_reduce(torch.ones(1))
            peer.kill()
        until = time.monotonic() + 5
        while not comm.disabled and time.monotonic() < until:
            time.sleep(0.01)
        with pytest.raises(
            PeerDiedError, match="rank 0 is unusable: the process of rank 1 is gone"
        ):
            comm.all_reduce(torch.ones(1))

    on_ranks(fake, 1, body)
    assert calls().count("ncclCommAbort") == 1 and "ncclCommDestroy" not in calls()


def test_what_nccl_reports_by_itself_ends_the_communicator(fake: str) -> None:
    def body(comm: HostNccl, rank: int) -> None:
        assert comm.nccl is not None
        comm.nccl.ncclCommDestroy(comm.comm)  # the fake reports "remote process exited" from now
        until = time.monotonic() + 5
        while not comm.disabled and time.monotonic() < until:
            time.sleep(0.01)
        with pytest.raises(RefusedError, match="remote process exited"):
            comm.all_reduce(torch.ones(1))

    on_ranks(fake, 1, body)


def test_a_missing_library_or_a_cpu_device_is_everybodys_refusal(fake: str) -> None:
    def body(group: Group) -> Any:
        path = fake if group.rank == 0 else "/absent/libnccl.so"
        return str(HostNccl(group, "cpu", path).refusal)

    reasons = run_ranks(2, body)
    assert reasons[0] == reasons[1]
    assert reasons[0].startswith("rank 1: /absent/libnccl.so cannot be loaded")
    (refusal,) = run_ranks(1, lambda group: PyNcclCommunicator(group, "cpu", fake).refusal)
    assert str(refusal) == "NCCL moves tensors on CUDA devices, and this one is cpu"


def test_the_setting_names_the_library(fake: str) -> None:
    def body(group: Group) -> Any:
        settings = dataclasses.replace(group.settings, nccl_so_path=fake)
        comm = HostNccl(group, settings=settings)
        comm.close()
        return comm.nccl_version

    assert run_ranks(1, body) == [22809]


def test_handles_that_contradict_each_other() -> None:
    own = own_process()
    with pytest.raises(CommMismatchError, match=r"rank 0 has NCCL 2\.28\.9 and rank 1 has NCCL 2"):
        check_handles([NcclHandle(22809, "a", b"", own), NcclHandle(22703, "b", b"", own)])
    with pytest.raises(CommunicatorError, match="rank 0 and 2 are both on GPU-a"):
        check_handles([NcclHandle(1, gpu, b"", own) for gpu in "aba"])


def test_a_call_that_blocks_is_given_up() -> None:
    block = threading.Event()
    started = time.monotonic()
    with pytest.raises(CommTimeoutError, match=r"ncclSlow did not return within 0\.2 s"):
        nccl_comm.bounded(block.wait, 0.2, "ncclSlow")
    assert time.monotonic() - started < 5
    block.set()
    assert nccl_comm.bounded(lambda: 3, 5, "quick") == 3
    with pytest.raises(ZeroDivisionError):
        nccl_comm.bounded(lambda: 1 // 0, 5, "wrong")


def test_a_rank_that_never_comes_is_a_refusal_within_the_deadline(
    fake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = PyNcclCommunicator.rendezvous

    def late(self: Any, handles: Any) -> None:
        if self.group.rank == 1:
            raise CommunicatorError("out of file descriptors")
        real(self, handles)

    monkeypatch.setattr(HostNccl, "rendezvous", late, raising=False)
    started = time.monotonic()
    reasons = run_ranks(2, lambda group: str(HostNccl(group, "cpu", fake).refusal), 5.0)
    assert time.monotonic() - started < 10
    assert reasons[0] == reasons[1]
    assert "ncclCommInitRank on rank 0 did not return within 4 s" in reasons[0]
