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
from ..functional.shm import REDUCED, SUMMED
from .reductions import by_of

#: Elements of each rank that are gathered at a time: bounds the memory.
_CHUNK = 1 << 20


class SharedMemory:
    """The collectives of one group over its CpuCommunicator."""

    def __init__(self, cpu: CpuCommunicator) -> None:
        self._cpu = cpu
        self._rank, self._world_size = cpu.group.rank, cpu.group.world_size
        self.name, self.barrier, self.close = cpu.name, cpu.barrier, cpu.close

    def broadcast(self, x: Tensor, root: int) -> None:
        self._cpu.broadcast(x.detach(), root)

    def all_reduce(self, call: str, x: Tensor, reduce_op: Any) -> None:
        """All ranks' `x` reduced, in place."""
        if x.is_conj() or x.is_neg():  # views, whose memory holds other numbers
            staged = x.detach().resolve_conj().resolve_neg()
            self.all_reduce(call, staged, reduce_op)
            x.detach().copy_(staged)
            return
        by = by_of(call, reduce_op, x, self._rank)
        x = _numbers(x.detach(), by)
        if by == "sum" and x.dtype in SUMMED:
            self._cpu.all_reduce_(x)
            return
        flat = x.contiguous().view(-1)
        if x.dtype in REDUCED:
            self._cpu.run("all_reduce", flat, flat, 0, by)
        else:
            self._gathered(flat, by)
        if flat.data_ptr() != x.data_ptr():
            x.copy_(flat.view_as(x))

    def _gathered(self, x: Tensor, by: str) -> None:
        """Products of complex numbers: gathered, and multiplied by each rank in rank order."""
        if by != "product" or not x.is_complex():
            raise InvalidArgumentError(
                f"a reduction on rank {self._rank}: {x.dtype} cannot be reduced by {by}"
            )
        for part in x.split(_CHUNK):
            parts = part.new_empty([self._world_size, part.numel()])
            self.all_gather(parts, part)
            total = parts[0]
            for rank in range(1, self._world_size):
                total = total * parts[rank]
            part.copy_(total)

    def reduce(self, call: str, x: Tensor, reduce_op: Any, root: int) -> None:
        """All ranks' `x` reduced into rank `root`'s `x`; the others keep theirs."""
        by = by_of(call, reduce_op, x, self._rank)
        x = _numbers(x.detach(), by)
        if x.dtype not in REDUCED:
            self.all_reduce(call, x if root == self._rank else x.clone(), reduce_op)
            return
        flat = x.contiguous().view(-1)
        out = flat if root == self._rank else None
        self._cpu.run("reduce", out, flat, root, by)
        if out is not None and out.data_ptr() != x.data_ptr():
            x.copy_(out.view_as(x))

    def reduce_scatter(self, name: str, out: Tensor, inp: Tensor, reduce_op: Any) -> None:
        """Part `rank` of the flat reduced `inp` into `out`."""
        if inp.numel() != out.numel() * self._world_size:
            raise InvalidArgumentError(
                f"{name} on rank {self._rank}: the input has {inp.numel()} elements and the output "
                f"{out.numel()}; the input must have {self._world_size} times as many"
            )
        by = by_of(name, reduce_op, inp, self._rank)
        inp, out = _numbers(inp.detach().resolve_conj(), by), _numbers(out.detach(), by)
        if inp.dtype in REDUCED:
            mine = _in_order(out)
            self._cpu.run("reduce_scatter", mine.view(-1), inp.reshape(-1), 0, by)
        else:
            whole = inp.reshape(-1).clone()
            self._gathered(whole, by)
            mine = whole.view(self._world_size, -1)[self._rank]
        _put(out, mine)

    def all_gather(self, out: Tensor, inp: Tensor) -> None:
        """Every rank's `inp` into `out`, in rank order."""
        out = out.detach()
        mine = _in_order(out)
        self._cpu.run("all_gather", mine.view(-1), inp.detach().reshape(-1))
        _put(out, mine)

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
        whole = torch.stack([x.detach() for x in parts]).view(-1) if root == self._rank else None
        out = out.detach()
        mine = _in_order(out)
        self._cpu.run("scatter", mine.view(-1), whole, root)
        _put(out, mine)

    def sizes(self, what: str, x: Tensor, sizes: Sequence[int]) -> list[int]:
        """Elements of `x` that go to, or come from, each rank, of `sizes` along dim 0."""
        length = x.size(0) if x.dim() else 1
        if not sizes and length % self._world_size:
            raise InvalidArgumentError(
                f"all_to_all_single on rank {self._rank}: size {length} of the {what} is not a "
                f"multiple of the {self._world_size} ranks; split sizes are needed"
            )
        sizes = list(sizes) or [length // self._world_size] * self._world_size
        if len(sizes) != self._world_size or sum(sizes) != length or min(sizes) < 0:
            raise InvalidArgumentError(
                f"all_to_all_single on rank {self._rank}: {what} split sizes {sizes} are not "
                f"{self._world_size} sizes with the sum {length}"
            )
        row = x.numel() // length if length else 0
        return [size * row for size in sizes]

    def all_to_all_single(
        self, out: Tensor, inp: Tensor, come: Sequence[int], to: Sequence[int]
    ) -> None:
        """to[p] elements of the flat `inp` to rank p, come[p] from it into the flat `out`."""
        out = out.detach()
        mine = _in_order(out)
        self._cpu.run("all_to_all", mine.view(-1), inp.detach().reshape(-1), splits=(to, come))
        _put(out, mine)

    def all_to_all(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        """inputs[p] to rank p, outputs[p] from it."""
        come = [x.numel() for x in outputs]
        out = outputs[0].new_empty(sum(come))
        joined = torch.cat([x.detach().reshape(-1) for x in inputs])
        self.all_to_all_single(out, joined, come, [x.numel() for x in inputs])
        for x, found in zip(outputs, out.split(come), strict=True):
            x.detach().copy_(found.view_as(x))


def _in_order(out: Tensor) -> Tensor:
    """`out` itself, or room like it whose elements lie in their order."""
    if out.is_contiguous():
        return out
    return torch.empty_like(out, memory_format=torch.contiguous_format)


def _put(out: Tensor, found: Tensor) -> None:
    """`found` in `out`, unless it is `out`, of _in_order."""
    if found is not out:
        out.copy_(found.view_as(out))


def _numbers(x: Tensor, by: str) -> Tensor:
    """`x`; the pairs of a complex one, which are added apart."""
    return torch.view_as_real(x) if x.is_complex() and by in ("sum", "avg") else x
