"""Arguments that no collective takes: our error on every rank, and nothing has moved."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from communicators import InvalidArgumentError, shm
from communicators.errors import CommMismatchError, CommTimeoutError
from communicators.groups.arguments import check_in_place, check_plain
from tests.ranks import Rank, pool, run_fresh
from tests.unit.test_group_coordinator import world_of
from tests.unit.test_shm_collectives import communicator

IN_PLACE = ("all_reduce_", "broadcast")


def no_tensors(with_fake):
    """What holds no plain numbers in memory of its own, and a part of what is said of it."""
    x = torch.ones(4, 4)
    found = {
        "a list": ([1.0, 2.0], "is a list"),
        "an array": (np.ones(4), "is a ndarray"),
        "None": (None, "is a NoneType"),
        "a number": (1.5, "is a float"),
        "coo": (x.to_sparse(), "layout sparse_coo"),
        "csr": (x.to_sparse_csr(), "layout sparse_csr"),
        "mkldnn": (x.to_mkldnn(), "layout _mkldnn"),
        "nested": (torch.nested.nested_tensor([x[0], x[0, :2]]), "layout nested"),
        "jagged": (torch.nested.nested_tensor([x[0], x[0, :2]], layout=torch.jagged), "nested"),
        "quantized": (torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "qint8"),
        "meta": (x.to("meta"), "on meta"),
    }
    if with_fake:  # a process that makes its first one takes seconds
        with FakeTensorMode():
            found["fake"] = (torch.ones(4, 4), "FakeTensor without memory")
    return found


def not_writable():
    with torch.inference_mode():
        inference = torch.ones(4, 4)
        inference_t = torch.ones(4, 4).t()
    leaf = torch.ones(4, 4, requires_grad=True)
    return {
        "expanded": (torch.ones(4, 1).expand(4, 4), "share memory"),
        "a window": (torch.ones(6).as_strided((4, 3), (1, 1)), "share memory"),
        "interleaved": (torch.ones(9).as_strided((3, 3), (2, 2)), "share memory"),
        "inference": (inference, "inference mode is off"),
        "inference, strided": (inference_t, "inference mode is off"),
        "a leaf": (leaf, "a leaf that requires grad"),
        "a parameter": (torch.nn.Parameter(torch.ones(4)), "a leaf that requires grad"),
        "a view of a leaf": (leaf[0], "a view that requires grad"),
        "one of several views": ((leaf * 2).unbind(0)[0], "a view that requires grad"),
    }


def calls(group, me):
    """name -> the collective of one tensor."""
    found = {
        "all_reduce": group.all_reduce,
        "all_reduce_": group.all_reduce_,
        "reduce_scatter": lambda x: group.reduce_scatter(x, 0),
        "all_gather": group.all_gather,
        "gather": group.gather,
        "broadcast": group.broadcast,
    }
    if hasattr(group, "reduce_scatterv"):
        found["reduce_scatterv"] = lambda x: group.reduce_scatterv(x, [2, 2])
        found["all_gatherv"] = lambda x: group.all_gatherv(x, [4, 4])
        found["send"] = lambda x: group.send(x, 1 - me)
    return found


def refused(call, name, given, text, rank):
    with pytest.raises(InvalidArgumentError) as caught:
        call(given)
    message = str(caught.value)
    assert text in message, message
    # A dtype is named by what travels: all_reduce for all_reduce_, reduce_scatter for ...v.
    assert name.rstrip("_v") in message and f"rank {rank}" in message, message


def refuse_tensors(group, me, with_fake=True):
    tensors = no_tensors(with_fake).values()
    for name, call in calls(group, me).items():
        for given, text in tensors:
            refused(call, name, given, text, me)
        if name in IN_PLACE:
            for given, text in not_writable().values():
                refused(call, name, given, text, me)
    assert group.all_reduce(torch.ones(1)).tolist() == [2.0], "in step"


def coordinator(rank: Rank, key):
    with world_of(rank, key) as tp:
        me = tp.rank_in_group
        refuse_tensors(tp, me)
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32,
                      torch.uint64, torch.bool):  # fmt: skip
            name = str(dtype).removeprefix("torch.")
            for size in (4, 0):
                x = torch.zeros(size).to(dtype)
                for call in (tp.all_reduce, tp.all_reduce_, lambda x: tp.reduce_scatter(x, 0)):
                    refused(call, "", x, f"{name} cannot be summed; bfloat16, ", me)
            x = torch.ones(3).to(dtype)
            assert tp.all_gather(x).view(torch.uint8).tolist() == x.view(torch.uint8).tolist() * 2
            assert tp.broadcast(x.clone()).dtype is dtype, "the others travel in any dtype"
        x = torch.ones(4)
        wrong = [
            (lambda: tp.all_gather(x, 0.0), "all_gather(dim=0.0)"),
            (lambda: tp.all_gather(x, None), "not a NoneType"),
            (lambda: tp.gather(x, "0"), "gather(dst='0')"),
            (lambda: tp.gather(x, True), "not a bool"),
            (lambda: tp.broadcast(x, 0.5), "broadcast(src=0.5)"),
            (lambda: tp.send(x, "next"), "send(dst='next')"),
            (lambda: tp.send(x, 2), "0..1"),
            (lambda: tp.reduce_scatterv(x, [2.0, 2.0]), "sizes=2.0"),
            (lambda: tp.reduce_scatterv(x, 4), "a sequence of integers"),
            (lambda: tp.reduce_scatterv(x, [5, -1]), "sizes >= 0"),
            (lambda: tp.all_gatherv(x, "44"), "a sequence of integers"),
            (lambda: tp.all_gatherv(x, []), "2 sizes >= 0"),
            (lambda: tp.reduce_scatter(torch.tensor(1.0)), "not a multiple"),
            (lambda: tp.recv((2, -1), torch.float32), "sizes >= 0"),
            (lambda: tp.recv(3, torch.float32), "recv(size=3)"),
            (lambda: tp.recv((3,), "float32"), "a torch.dtype is expected"),
            (lambda: tp.recv((3,), torch.qint8), "none that is quantized"),
            (lambda: tp.recv((3,), torch.float32, device="nowhere"), "a device is expected"),
            (lambda: tp.recv((3,), torch.float32, device="meta"), "communicates from cpu"),
            (lambda: tp.recv((3,), torch.float32, 1.0), "recv(src=1.0)"),
        ]
        for call, text in wrong:
            with pytest.raises(InvalidArgumentError) as caught:
                call()
            assert text in str(caught.value) and f"rank {me}" in str(caught.value)
        assert tp.all_reduce(x).tolist() == [2.0] * 4, "in step"
        assert tp.all_gather(x, np.int64(0)).shape == (8,)


def test_the_coordinator_refuses():
    pool(2).run(coordinator, "bad")


def over_gloo(rank: Rank, key):
    os.environ["COMMUNICATORS_DISABLE"] = "cpu_shm"
    with world_of(rank, key) as tp:
        refuse_tensors(tp, tp.rank_in_group, with_fake=False)
        for dtype in (torch.int16, torch.uint16, torch.float8_e4m3fn, torch.bool):
            x = torch.ones(2, 3).to(dtype)
            refused(tp.all_reduce, "", x, "cannot be summed; bfloat16", tp.rank_in_group)
            for moved in (tp.all_gather(x, 0)[2:], tp.broadcast(x.clone()), tp.gather(x, 0, 0)):
                if moved is not None:
                    assert torch.equal(moved.view(torch.uint8)[:2], x.view(torch.uint8)), dtype
            if tp.is_first_rank:
                tp.send(x)
            else:
                assert torch.equal(tp.recv((2, 3), dtype).view(torch.uint8), x.view(torch.uint8))
        views(tp, (torch.float32, torch.complex64))


def test_so_it_does_over_gloo():
    for outcome in run_fresh(2, over_gloo, "bad gloo"):
        assert not outcome.error, outcome.trace


def views(tp, dtypes):
    """conj and neg views arrive as what they show, and are written as such."""
    me = tp.rank_in_group
    for dtype in dtypes:
        real = torch.arange(1.0, 5.0).view(2, 2) * (me + 1)
        z = torch.complex(real, real + 1)
        for make in (
            (lambda z: torch._neg_view(z), torch.conj)
            if dtype.is_complex
            else (lambda z: torch._neg_view(z.real.contiguous()), lambda z: z.conj().imag)
        ):
            x = make(z.clone())
            plain = x.resolve_conj().resolve_neg()
            total = tp.all_reduce(plain)
            assert torch.equal(tp.all_reduce(x), total)
            gathered = tp.all_gather(plain, 0)
            assert torch.equal(tp.all_gather(x, 0), gathered)
            assert torch.equal(tp.reduce_scatter(x, 0), total[me : me + 1])
            root = tp.gather(x, 1, 0)
            assert root is None or torch.equal(root, gathered)
            if me == 0:
                tp.send(x)
            else:
                assert torch.equal(tp.recv(x.shape, x.dtype), gathered[:2])
            assert tp.all_reduce_(x) is x
            assert torch.equal(x, total)
            y = make(z.clone())
            tp.broadcast(y, 1)
            assert torch.equal(y, gathered[2:])


def over_shared_memory(rank: Rank, key):
    with world_of(rank, key) as tp:
        views(tp, (torch.float32, torch.complex64))
        x = torch.full((3, 2), float(rank.rank)).t()[::2]
        with torch.inference_mode():
            y = torch.ones(2, 3).t()
            assert tp.all_reduce_(y).tolist() == [[2.0] * 2] * 3, "in its own mode it is written"
        with torch.no_grad():
            leaf = torch.ones(3, requires_grad=True)
            assert tp.all_reduce_(leaf).tolist() == [2.0] * 3
        hidden = leaf * 1
        assert tp.all_reduce_(hidden) is hidden
        assert tp.broadcast(x, 1).eq(1).all()
        gaps = torch.zeros(20).as_strided((3, 4), (3, 4))  # interleaved, and no two at one address
        assert tp.all_reduce_(gaps + 0).sum() == 0


def test_views_and_modes_that_are_accepted():
    pool(2).run(over_shared_memory, "views")


def cpu_methods(rank: Rank):
    cpu = communicator(rank)
    me = rank.rank
    refuse_tensors(cpu, me)
    for name in ("all_reduce", "all_reduce_", "reduce_scatter"):
        x = torch.ones(4).to(torch.float8_e4m3fn)
        refused(calls(cpu, me)[name], name, x, "float8_e4m3fn cannot be summed", me)
    handle = cpu._handle
    x = torch.ones(4)
    neg = torch._neg_view(torch.ones(4))
    a_list: Any = [1.0]
    nothing: Any = None
    wrong = [
        (lambda: shm.shm_allreduce(handle, [1.0]), "is a list"),
        (lambda: shm.shm_allreduce(handle, neg), "neg view"),
        (lambda: shm.shm_allreduce(handle, x[::2]), "not contiguous"),
        (lambda: shm.shm_allreduce(handle, x.bool()), "bool cannot be summed"),
        (lambda: shm.shm_all_gather(handle, None, x), "data is a NoneType"),
        (lambda: shm.shm_all_gather(handle, x, x[:1].expand(8)), "share memory"),
        (lambda: shm.shm_gather(handle, x, [x, x[:2]], 0), "outputs like it"),
        (lambda: shm.shm_send_tensor_list(handle, x, 1 - me), "a sequence of tensors"),
        (lambda: shm.shm_send_tensor_list(handle, [x, a_list], 1 - me), "a list was given"),
        (lambda: cpu.send_tensor_list([x, nothing], 1 - me), "a NoneType was given"),
        (lambda: shm.send(handle, x.to("meta"), 1 - me), "on meta"),
        (lambda: shm.recv_(handle, x.view(2, 2).t(), 1 - me), "not contiguous"),
    ]
    for call, text in wrong:
        with pytest.raises(InvalidArgumentError) as caught:
            call()
        assert text in str(caught.value), str(caught.value)
        assert f"rank {me}" in str(caught.value)
    assert cpu.all_reduce(x).tolist() == [2.0] * 4, "in step"
    assert torch.equal(cpu.all_reduce_(neg), torch.full((4,), -2.0))


def test_shared_memory_refuses():
    pool(2).run(cpu_methods)


def alone_in_it(rank: Rank, key):
    """One rank passes what is wrong: it says so at once, the other hears of it in time."""
    with world_of(rank, key, timeout_s=2) as tp:
        x = torch.ones(1, 4).expand(4, 4) if rank.rank == 1 else torch.ones(4, 4)
        expected = InvalidArgumentError if rank.rank == 1 else (CommTimeoutError, CommMismatchError)
        with pytest.raises(expected):
            tp.all_reduce_(x)


def test_one_rank_alone_in_it():
    for outcome in run_fresh(2, alone_in_it, "alone in it"):
        assert not outcome.error, outcome.trace


def test_what_reads_memory_as_it_is_refuses_views():
    check_plain("call", torch.ones(2), 0)
    for view in (torch._neg_view(torch.ones(2)), torch.ones(2, dtype=torch.complex64).conj()):
        with pytest.raises(InvalidArgumentError, match=r"call\(x\) on rank 3: x is a .* view"):
            check_plain("call", view, 3)


def test_overlap_is_found_exactly():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        sizes = torch.randint(1, 5, (3,), generator=generator).tolist()
        strides = torch.randint(0, 12, (3,), generator=generator).tolist()
        x = torch.zeros(200).as_strided(sizes, strides)
        offsets = torch.arange(200.0).as_strided(sizes, strides).flatten()
        if offsets.unique().numel() == x.numel():
            check_in_place("call", x, 0)
        else:
            with pytest.raises(InvalidArgumentError, match="share memory"):
                check_in_place("call", x, 0)
