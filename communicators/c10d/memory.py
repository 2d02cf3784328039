"""What a torch process group does with its tensors, on CPU shared memory.

Tensors may have any layout; results are written where the caller's tensors lie. All ranks call the
same method with the same sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.cpu import CpuCommunicator
from ..errors import InvalidArgumentError
from ..shm import SUMMED
from . import reductions


class SharedMemory:
    """The collectives of one group over its CpuCommunicator."""

    def __init__(self, cpu: CpuCommunicator) -> None:
        self._cpu = cpu
        self._rank, self._world_size = cpu.group.rank, cpu.group.world_size
        self.name, self.barrier, self.close = cpu.name, cpu.barrier, cpu.close

    def broadcast(self, x: Tensor, root: int) -> None:
        self._cpu.broadcast(x.detach(), root)

    def reduce(self, call: str, x: Tensor, reduce_op: Any) -> None:
        """All ranks' `x` reduced into this rank's `x`."""
        kind = reductions.kind(call, reduce_op, x, self._rank)
        x = x.detach()
        if kind.summed and x.is_complex():
            x = torch.view_as_real(x)
        if kind.summed and x.dtype in SUMMED:
            self._cpu.all_reduce_(x)
        else:
            flat = x.contiguous().view(-1)
            reductions.reduce(kind, flat, self._world_size, self.all_gather)
            if flat.data_ptr() != x.data_ptr():
                x.copy_(flat.view_as(x))
        if kind.averaged:
            reductions.average(x, self._world_size)

    def reduce_scatter(self, name: str, out: Tensor, inp: Tensor, reduce_op: Any) -> None:
        """Part `rank` of the flat reduced `inp` into `out`."""
        if inp.numel() != out.numel() * self._world_size:
            raise InvalidArgumentError(
                f"{name} on rank {self._rank}: the input has {inp.numel()} elements and the output "
                f"{out.numel()}; the input must have {self._world_size} times as many"
            )
        kind = reductions.kind(name, reduce_op, inp, self._rank)
        inp, out = inp.detach(), out.detach()
        if kind.summed and inp.is_complex():
            inp, out = torch.view_as_real(inp.resolve_conj()), torch.view_as_real(out)
        if kind.summed and inp.dtype in SUMMED:
            mine = out if out.is_contiguous() else torch.empty_like(out)
            self._cpu.run("reduce_scatter", mine.view(-1), inp.reshape(-1))
            if kind.averaged:
                reductions.average(mine, self._world_size)
        else:
            whole = inp.reshape(-1).clone()
            self.reduce(name, whole, reduce_op)
            mine = whole.view(self._world_size, -1)[self._rank]
        if mine.data_ptr() != out.data_ptr():
            out.copy_(mine.view_as(out))

    def all_gather(self, out: Tensor, inp: Tensor) -> None:
        """Every rank's contiguous `inp` into the contiguous `out`, in rank order."""
        self._cpu.run("all_gather", out.view(-1), inp.reshape(-1))

    def all_gather_into_list(self, parts: Sequence[Tensor], inp: Tensor) -> None:
        if len({part.numel() for part in parts}) == 1 and parts[0].numel() == inp.numel():
            whole = inp.new_empty([self._world_size, inp.numel()])
            self.all_gather(whole, inp)
            for part, found in zip(parts, whole.unbind(0), strict=True):
                part.detach().copy_(found.view_as(part))
            return
        for rank, part in enumerate(parts):  # of unequal sizes: each in turn
            mine = inp.contiguous().clone() if rank == self._rank else part.detach().contiguous()
            self._cpu.broadcast(mine, rank)
            part.detach().copy_(mine.view_as(part))

    def gather(self, parts: Sequence[Tensor], inp: Tensor, root: int) -> None:
        """Every rank's `inp` into `parts` of rank `root`; the others pass none."""
        inp = inp.detach().contiguous().view(-1)
        whole = inp.new_empty([self._world_size, inp.numel()]) if root == self._rank else None
        self._cpu.run("gather", whole, inp, root)
        if whole is not None:
            for part, found in zip(parts, whole.unbind(0), strict=True):
                part.detach().copy_(found.view_as(part))

    def scatter(self, out: Tensor, parts: Sequence[Tensor], root: int) -> None:
        """Rank `root`'s parts[p] into `out` of rank p; the others pass none."""
        if root != self._rank:
            self.receive(out.detach(), root)
            return
        for rank, part in enumerate(parts):
            if rank == self._rank:
                out.detach().copy_(part.detach().view_as(out))
            else:
                self.send(part.detach(), rank)

    def parts(self, what: str, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """What of `x` goes to, or comes from, each rank, along dim 0."""
        length = x.size(0) if x.dim() else 1
        if not sizes and length % self._world_size:
            raise InvalidArgumentError(
                f"all_to_all_single on rank {self._rank}: size {length} of the {what} is not a "
                f"multiple of the {self._world_size} ranks; split sizes are needed"
            )
        sizes = list(sizes) or [length // self._world_size] * self._world_size
        if len(sizes) != self._world_size or sum(sizes) != length:
            raise InvalidArgumentError(
                f"all_to_all_single on rank {self._rank}: {what} split sizes {sizes} are not "
                f"{self._world_size} sizes with the sum {length}"
            )
        return list(x.detach().split(sizes))

    def exchange(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        """inputs[p] to rank p, outputs[p] from it: in pairs, the lower sends first."""
        outputs[self._rank].copy_(inputs[self._rank].view_as(outputs[self._rank]))
        even = self._world_size + self._world_size % 2  # one sits out where the number is odd
        for turn in range(even - 1):
            peer = _partner(self._rank, turn, even)
            if peer >= self._world_size:
                continue
            if self._rank < peer:
                self.send(inputs[peer], peer)
            self.receive(outputs[peer], peer)
            if self._rank > peer:
                self.send(inputs[peer], peer)

    def send(self, x: Tensor, peer: int) -> None:
        if x.numel():
            self._cpu.run("send", None, x.contiguous().view(-1), peer)

    def receive(self, x: Tensor, peer: int) -> None:
        if x.numel():
            whole = x if x.is_contiguous() else torch.empty_like(x)
            self._cpu.run("recv", whole.view(-1), None, peer)
            if whole is not x:
                x.copy_(whole)


def _partner(rank: int, turn: int, count: int) -> int:
    """Whom `rank` of `count` (even) meets in this turn of count-1: each meets all others once."""
    last = count - 1
    if rank == last:
        return turn
    if rank == turn:
        return last
    return (2 * turn - rank) % last
