"""PyMscclppCommunicator and the mscclpp functions over a stand-in package, ranks as threads."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from communicators import Group, RefusedError, Settings
from communicators.backends.mscclpp import pymscclpp
from communicators.backends.mscclpp.context import ALGORITHMS
from communicators.backends.mscclpp.pymscclpp import (
    PyMscclppCommunicator,
    mscclpp_bench_time,
    mscclpp_convert_to_bytes,
    mscclpp_is_weak_contiguous,
)
from communicators.errors import InvalidArgumentError
from communicators.functional import mscclpp as functions
from communicators.selection.dispatcher import Dispatcher
from tests import fake_mscclpp as fake
from tests.threads import run_ranks

WORLDS = pytest.mark.parametrize("world_size", [2, 4, 8])


@pytest.fixture(autouse=True)
def package(monkeypatch):
    yield fake.install(monkeypatch)
    assert fake.problems == []
    assert not any("nvls" in name for name in fake.ran)


class OnCpu(PyMscclppCommunicator):
    def platform(self):
        return None


def opened(group, max_bytes="4KB", **options):
    communicator = OnCpu(group, "cpu", max_bytes, **options)
    assert communicator.refusal is None, communicator.refusal
    return communicator


def check(results):
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


@WORLDS
def test_sums_and_gathers_of_every_dtype_and_size(world_size):
    def body(group):
        communicator = opened(group)
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for nbytes in (16, 48, 1024, 1040, 2000, 4096):
                x = (torch.arange(nbytes // dtype.itemsize) % 7 + group.rank).to(dtype)
                parts = [x - group.rank + rank for rank in range(world_size)]
                assert communicator.should_mscclpp_allreduce(x)
                out = communicator.all_reduce(x)
                assert torch.equal(out, torch.stack(parts).sum(0))
                assert torch.equal(x, parts[group.rank]) and out.data_ptr() != x.data_ptr()
                gathered = torch.empty(world_size * x.numel(), dtype=dtype)
                communicator.run("all_gather", gathered, x)
                assert torch.equal(gathered, torch.cat(parts))
        # A view that starts in the middle of 16 bytes, on one rank only.
        base = torch.ones(257, dtype=torch.float32)
        shifted = base[1:] if group.rank == 0 else base[:-1]
        assert torch.equal(communicator.all_reduce(shifted), shifted * world_size)
        return communicator.tuned

    tuned = check(run_ranks(world_size, body, timeout_s=60))
    assert all(table == tuned[0] for table in tuned)
    assert [size for size, _ in tuned[0][torch.bfloat16]] == [1024, 2048, 4096]


def test_a_dispatcher_runs_it():
    def body(group):
        dispatcher = Dispatcher(group, torch.device("cpu"), [opened(group, 1024)])
        x = torch.full((8,), group.rank + 1.0)
        dispatcher.run("all_reduce", x, x)
        assert torch.equal(x, torch.full((8,), 3.0))
        return dispatcher.explain()

    for text in check(run_ranks(2, body, timeout_s=60)):
        assert "up to 1 KB: mscclpp" in text


class Timed(OnCpu):
    """Rank 0 finds packet fast, rank 1 allpair_packet; rsag is never the slowest anywhere."""

    us = ({"packet": 1.0, "allpair_packet": 9.0, "rsag": 5.0},
          {"packet": 9.0, "allpair_packet": 1.0, "rsag": 5.0})  # fmt: skip

    def _time(self, config, inp):
        super()._time(config, inp)
        return self.us[self.group.rank][config[0]]


def test_the_slowest_rank_decides():
    def body(group):
        return Timed(group, "cpu", 1024).tuned[torch.bfloat16]

    for table in check(run_ranks(2, body, timeout_s=60)):
        assert table == [(1024, ("rsag", 16, 1024))]


@pytest.mark.parametrize("fault", [fake.failing, fake.wrong])
def test_a_configuration_that_fails_on_one_rank_is_voted_out(fault):
    fault.update(("rsag", 1, blocks) for blocks in (16, 32))
    fault.update((name, 0, blocks) for name in ("packet", "allpair_packet") for blocks in range(99))

    def body(group):
        return Timed(group, "cpu", 1024).tuned[torch.bfloat16]

    for table in check(run_ranks(2, body, timeout_s=60)):
        assert table == [(1024, ("rsag", 64, 1024))]


def test_nothing_left_is_a_refusal_on_all_ranks():
    fake.failing.update((n, 1, b) for n in ("packet", "allpair_packet", "rsag") for b in range(99))
    for communicator in check(run_ranks(2, lambda g: OnCpu(g, "cpu", 1024), timeout_s=60)):
        assert str(communicator.refusal).startswith("no algorithm of the package ran on all ranks")
        assert communicator.disabled and communicator.context is None


@WORLDS
def test_limits_are_those_of_the_kernels(world_size):
    fits: Any = {name: algorithm.fits for name, algorithm in ALGORITHMS.items()}
    scratch, w = 12 << 20, world_size
    assert fits["packet"](1 << 20, w, scratch) is None
    assert "more than its 1048576" in fits["packet"]((1 << 20) + 8 * w, w, scratch)
    assert f"not a multiple of 8 x {w} ranks" in fits["packet"](8 * w + 8, w, scratch)
    assert fits["allpair_packet"](scratch // (4 * w), w, scratch) is None
    assert "more than its" in fits["allpair_packet"](scratch // (4 * w) + 4, w, scratch)
    assert fits["rsag"](scratch, w, scratch) is None and fits["rsag"](scratch + 16, w, scratch)
    assert fits["fullmesh"](8 << 20, w, w * 56 * 1024 * 64) is None
    assert "bytes of scratch" in fits["fullmesh"](8 << 20, w, w * 56 * 1024 * 64 - 1)
    for name, algorithm in ALGORITHMS.items():
        assert all(algorithm.accepts(*launch, w) for launch in algorithm.launches(w)), name
    if w > 2:
        assert not ALGORITHMS["packet"].accepts(4 * (w - 1) + 1, 512, w)


def test_bad_calls_are_sentences():
    def body(group):
        communicator = opened(group)
        x = torch.zeros(8)
        for bad, op, reason in (
            (x.double(), dist.ReduceOp.SUM, "float64 is not one of float16, bfloat16, float32"),
            (x, dist.ReduceOp.MAX, "it sums; "),
            (x[:1], dist.ReduceOp.SUM, "4 bytes are not a positive multiple of 16 up to 4096"),
            (torch.zeros(2048), dist.ReduceOp.SUM, "8192 bytes are not"),
            (x.to("meta"), dist.ReduceOp.SUM, "the tensor is on meta"),
        ):
            assert not communicator.should_mscclpp_allreduce(bad, op)
            with pytest.raises(RefusedError, match=f"on rank {group.rank}: {reason}"):
                communicator.all_reduce(bad, op)
        with communicator.change_state(enable=False):
            assert communicator.disabled and not communicator.should_mscclpp_allreduce(x)
            with pytest.raises(RefusedError, match="switched off"):
                communicator.all_reduce(x)
            with communicator.change_state():
                assert communicator.should_mscclpp_allreduce(x)
        assert not communicator.disabled and communicator.should_mscclpp_allreduce(x)
        context = communicator.context
        for name, tensor, launch, reason in (
            ("packet", torch.zeros(6), (0, 0), "not a multiple of 8 x 2 ranks"),
            ("rsag", torch.zeros(9)[1:], (0, 0), "start at a multiple of 16 bytes"),
            ("allpair_packet", x, (65, 512), "65 blocks of 512 threads are no launch for 2 ranks"),
            ("rsag", x, (4, 2048), "4 blocks of 2048 threads are no launch"),
            ("nvls_packet", x, (0, 0), "does not have it"),
        ):
            with pytest.raises(InvalidArgumentError, match=reason):
                context.execute(name, tensor, torch.empty_like(tensor), *launch)
        communicator.close()
        communicator.close()
        with pytest.raises(RefusedError, match="closed"):
            communicator.all_reduce(x)

    check(run_ranks(2, body, timeout_s=60))


def test_two_communicators_on_one_rank_count_for_themselves():
    """Ranks 0 and 1, then 0 and 2: rank 0 makes calls that rank 2 knows nothing of."""
    store = dist.HashStore()

    def body(world):
        settings = Settings(timeout_s=60)
        x, made = torch.ones(256), []
        for members in ((0, 1), (0, 2)):
            if world.rank in members:
                name, rank = f"of {members}", members.index(world.rank)
                group = Group(store, rank, 2, name=name, settings=settings)
                made.append(opened(group, 1024))
        for communicator in made:
            for _ in range(3):
                assert torch.equal(communicator.all_reduce(x), 2 * x)

    check(run_ranks(3, body, timeout_s=60))
    assert "default_allreduce_packet" in fake.ran


def test_refusals_name_what_is_missing(package, monkeypatch):
    def refusal(world_size=2, kind=OnCpu):
        made = check(run_ranks(world_size, lambda g: kind(g, "cpu", 1024), timeout_s=60))
        assert len({str(communicator.refusal) for communicator in made}) == 1
        return str(made[0].refusal)

    assert "world size 3" not in refusal(3)  # any world from 2 to 8
    assert refusal(1) == "world size 1 is not one of 2 to 8"
    assert refusal(kind=PyMscclppCommunicator).startswith("it works on CUDA devices")
    fake.ranks_per_node.append(1)
    assert "1 of the 2 ranks are on this host" in refusal()
    fake.ranks_per_node.clear()
    monkeypatch.delattr(package, "AlgorithmCollection")
    assert "has no AlgorithmCollection" in refusal()
    monkeypatch.setitem(__import__("sys").modules, "mscclpp", None)
    assert refusal().startswith("the Python package mscclpp cannot be imported")
    with pytest.raises(RefusedError, match="mscclpp cannot be imported"):
        functions.mscclpp_generate_unique_id()


@WORLDS
@pytest.mark.parametrize("selection", [1, 2])
def test_the_functions_of_the_kernel_library(world_size, selection):
    identity = functions.mscclpp_generate_unique_id()
    assert identity.dtype == torch.uint8 and identity.numel() == 128

    def init(rank, **changes):
        arguments = dict(
            unique_id=identity, rank=rank, world_size=world_size,
            scratch=torch.zeros(1 << 17, dtype=torch.uint8), put_buffer=torch.empty(0),
            nranks_per_node=world_size, rank_to_node=[0] * world_size,
            rank_to_ib=list(range(world_size)), context_selection=selection,
        )  # fmt: skip
        return functions.mscclpp_init_context(**{**arguments, **changes})

    def body(group):
        handle = init(group.rank)
        for numel, dtype in ((512, torch.bfloat16), (100, torch.float32), (2048, torch.float16)):
            x = torch.full((numel,), group.rank + 1.0, dtype=dtype)
            out = torch.empty_like(x)
            functions.mscclpp_allreduce(handle, x, out, 0, 0)
            assert torch.equal(out, torch.full_like(x, world_size * (world_size + 1) // 2))
        large = torch.zeros(1 << 16)
        with pytest.raises(InvalidArgumentError, match=r"no algorithm takes it \("):
            functions.mscclpp_allreduce(handle, large, torch.empty_like(large), 0, 0)
        with pytest.raises(InvalidArgumentError, match="must be alike"):
            functions.mscclpp_allreduce(handle, x, out.float(), 0, 0)

    check(run_ranks(world_size, body, timeout_s=60))
    with pytest.raises(InvalidArgumentError, match="context_selection=3 is not one of"):
        init(0, context_selection=3)
    with pytest.raises(RefusedError, match="only contexts within one node"):
        init(0, nranks_per_node=1)
    with pytest.raises(InvalidArgumentError, match="unique_id must be 128 bytes"):
        init(0, unique_id=identity[:64])
    with pytest.raises(InvalidArgumentError, match="0 is no open context"):
        functions.mscclpp_allreduce(0, torch.zeros(4), torch.zeros(4), 0, 0)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("1MB", 1 << 20), ("2.5kb", 2560), ("3 GB", 3 << 30), ("64", 64), (64, 64), ("1KiB", 1024),
     ("2t", 2 << 40), ("8B", 8)],
)  # fmt: skip
def test_sizes_in_words(text, nbytes):
    assert mscclpp_convert_to_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "MB", "-1KB", "1XB", "0.5", "1.0001KB"])
def test_sizes_that_are_none(text):
    with pytest.raises(InvalidArgumentError, match="a whole number of bytes is expected"):
        mscclpp_convert_to_bytes(text)


def test_small_helpers():
    x = torch.zeros(4, 6)
    assert mscclpp_is_weak_contiguous(x) and mscclpp_is_weak_contiguous(x.t())
    assert not mscclpp_is_weak_contiguous(x[:, ::2])
    calls = []
    assert mscclpp_bench_time(lambda: calls.append(0), 5, 2) > 0
    assert len(calls) == 7


@pytest.mark.parametrize("captured", [False, True])
def test_what_a_graph_reads_outlives_close(monkeypatch, captured):
    kept = []
    monkeypatch.setattr(pymscclpp, "_kept", kept)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)

    def body(group):
        communicator = opened(group)
        context, scratch = communicator.context, communicator._scratch
        x = torch.zeros(256)
        context._ran.update(context.algorithms)
        context.device = torch.device("cuda:0")  # asked whether its stream is captured
        monkeypatch.setattr(torch.cuda, "current_stream", lambda at: SimpleNamespace(cuda_stream=0))
        context.execute("packet", x, torch.empty_like(x))
        assert context.captured == captured
        communicator.close()
        assert ((context, scratch) in kept) == captured
        assert (context.communicator is not None) == captured

    check(run_ranks(2, body, timeout_s=60))
