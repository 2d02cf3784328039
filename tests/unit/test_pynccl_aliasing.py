"""What PyNcclCommunicator writes and what it leaves: new tensors, outputs, and in place by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.distributed import ReduceOp

from communicators.errors import InvalidArgumentError
from tests.unit.test_pynccl import HostNccl, calls, fake, on_ranks, ramp

__all__ = ["calls", "fake"]  # fixtures


def test_all_reduce_is_a_new_tensor_or_goes_into_out_tensor(fake: str) -> None:
    def body(comm: HostNccl, rank: int) -> None:
        x, total = ramp(rank, 4), ramp(0, 4) + ramp(1, 4)
        y = comm.all_reduce(x)
        assert y.data_ptr() != x.data_ptr() and torch.equal(y, total)
        out = torch.empty(4)
        assert comm.all_reduce(x, out) is out and torch.equal(out, total)
        assert comm.all_reduce(x, out_tensor=out, op=ReduceOp.MAX) is out
        assert torch.equal(out, ramp(1, 4))
        assert torch.equal(comm.all_reduce(x, None, ReduceOp.MAX), ramp(1, 4))
        assert torch.equal(x, ramp(rank, 4))  # through all of them
        assert comm.all_reduce(x, x) is x and torch.equal(x, total)  # in place where it is said

    on_ranks(fake, 2, body)


def test_all_reduce_in_place_has_a_name_of_its_own(fake: str) -> None:
    def body(comm: HostNccl, rank: int) -> None:
        x = ramp(rank, 4)
        assert comm.all_reduce_(x, ReduceOp.MAX) is x
        assert torch.equal(x, ramp(1, 4))
        y = torch.full((3,), float(rank + 2))
        comm.all_reduce_(y, op=ReduceOp.PRODUCT)
        assert torch.equal(y, torch.full((3,), 6.0))

    on_ranks(fake, 2, body)


def test_an_op_where_the_output_belongs_is_refused(
    fake: str, calls: Callable[[], list[str]]
) -> None:
    def body(comm: HostNccl, rank: int) -> None:
        before, x = len(calls()), torch.ones(4)
        for wrong in (ReduceOp.MAX, ReduceOp(ReduceOp.MAX), 0, "sum"):
            with pytest.raises(InvalidArgumentError, match=r"op comes third.*all_reduce_\("):
                comm.all_reduce(x, wrong)
        assert len(calls()) == before and not comm.disabled

    on_ranks(fake, 1, body)


@pytest.mark.parametrize("op", ["all_gather", "reduce_scatter", "send"])
def test_what_is_only_read_stays(fake: str, op: str) -> None:
    def body(comm: HostNccl, rank: int) -> None:
        x = ramp(rank, 4)
        if op == "all_gather":
            comm.all_gather(torch.empty(8), x)
        elif op == "reduce_scatter":
            comm.reduce_scatter(torch.empty(2), x)
        elif rank == 0:
            comm.send(x, 1)
        else:
            comm.recv(torch.empty(4), 0)
        assert torch.equal(x, ramp(rank, 4))

    on_ranks(fake, 2, body)
