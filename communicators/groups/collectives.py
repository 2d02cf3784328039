"""Collectives: what a group's coordinator does with tensors.

It checks arguments, allocates results, brings tensors into the contiguous form that communicators
take, and hands each call to the dispatcher of the tensor's device. Under torch.compile it calls the
operator of the same name instead (traced.py). Every check comes before anything moves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..base import Splits
from ..errors import InvalidArgumentError
from ..selection.dispatcher import Dispatcher
from .arguments import (
    check_by,
    check_dim,
    check_in_place,
    check_new,
    check_peer,
    check_root,
    check_sizes,
    check_tensor,
)
from .group import Group

_ops = torch.ops.communicators


class Collectives:
    """The part of GroupCoordinator that moves tensors; its constructor sets the attributes."""

    name: str
    world_size: int
    rank_in_group: int
    device: torch.device
    group: Group
    _dispatchers: dict[str, Dispatcher]
    _dispatcher_at: dict[torch.device, Dispatcher]  # where tensors have been seen
    _host: Dispatcher | None  # the one of host memory
    _order: Tensor  # traced.order_tensor

    # -- reductions ---------------------------------------------------------------------------

    def all_reduce(self, x: Tensor, *, exact: bool = False, op: Any = "sum") -> Tensor:
        """The sum of every rank's `x`, as a new tensor; never aliases `x`.

        Our own paths add in rank order in fp32 and round once: equal bits on all ranks. `exact`
        leaves out the quantized all-reduce, where the group's settings allow that one.

        Args:
            op: "sum", "avg" (of integers towards zero), "product", "min", "max" (NaN is both), or
                "band", "bor", "bxor" of integers and bool; also torch's ReduceOp of that name.
        """
        by = op if op == "sum" else check_by("all_reduce", op, self.rank_in_group)
        if is_compiling():
            x = self._tensor("all_reduce", x)
            if self.world_size == 1:
                return x.clone(memory_format=torch.contiguous_format)
            return _ops.group_all_reduce(x, self.name, exact, by, order=self._order)
        if type(x) is not Tensor or x.layout is not torch.strided or x.is_neg():
            x = check_tensor("all_reduce", x, self.rank_in_group)
        x = x.contiguous()
        out = torch.empty_like(x)
        if self.world_size == 1:
            return out.copy_(x)
        self._run("all_reduce", out, x, exact=exact, by=by)
        return out

    def all_reduce_(self, x: Tensor, *, exact: bool = False, op: Any = "sum") -> Tensor:
        """The same in place; returns `x`."""
        by = op if op == "sum" else check_by("all_reduce_", op, self.rank_in_group)
        if is_compiling():
            x = self._tensor("all_reduce_", x)
            if self.world_size > 1:
                _ops.group_all_reduce_(x, self.name, exact, by, order=self._order)
            return x
        if (
            type(x) is not Tensor
            or x.layout is not torch.strided
            or not x.is_contiguous()
            or x.requires_grad
            or x.is_inference()
            or x.is_neg()
        ):
            staged = check_in_place("all_reduce_", x, self.rank_in_group)
        else:  # what check_in_place lets through, as nearly all are
            staged = x
        if self.world_size > 1:
            self._run("all_reduce", staged, staged, exact=exact, by=by)
        return x if staged is x else x.copy_(staged)

    def reduce(self, x: Tensor, dst: int = 0, *, op: Any = "sum") -> Tensor | None:
        """all_reduce for rank `dst` of the group alone; None on the others."""
        x = self._tensor("reduce", x)
        rank = self.rank_in_group
        dst = check_root("reduce", "dst", dst, self.world_size, rank)
        by = check_by("reduce", op, rank)
        if self.world_size == 1:
            return x.clone(memory_format=torch.contiguous_format)
        if is_compiling():
            found = _ops.group_reduce(x, dst, rank, self.name, by, order=self._order)
            return found if rank == dst else None
        x = x.contiguous()
        out = torch.empty_like(x) if rank == dst else None
        self._run("reduce", out, x, dst, by=by)
        return out

    def reduce_scatter(self, x: Tensor, dim: int = -1) -> Tensor:
        """Part `rank_in_group` of the sum, split evenly along `dim`; a new tensor."""
        x = self._tensor("reduce_scatter", x)
        dim = check_dim("reduce_scatter", x, dim, self.rank_in_group)
        if is_compiling() and self.world_size > 1:
            return _ops.group_reduce_scatter(x, dim, self.world_size, self.name, order=self._order)
        size = x.size(dim) if x.dim() else 1
        if size % self.world_size:
            raise InvalidArgumentError(
                f"reduce_scatter(x, dim={dim}) on rank {self.rank_in_group}: size {size} of x "
                f"{list(x.shape)} is not a multiple of the {self.world_size} ranks; use "
                "reduce_scatterv"
            )
        return self.reduce_scatterv(x, [size // self.world_size] * self.world_size, dim)

    def reduce_scatterv(self, x: Tensor, sizes: Sequence[int], dim: int = 0) -> Tensor:
        """reduce_scatter with parts of given sizes: rank r gets sizes[r] along `dim`."""
        x = self._tensor("reduce_scatterv", x)
        rank = self.rank_in_group
        dim = check_dim("reduce_scatterv", x, dim, rank)
        if is_compiling() and self.world_size > 1:
            sizes = check_sizes("reduce_scatterv", x, sizes, self.world_size, rank)
            return _ops.group_reduce_scatterv(x, sizes, dim, rank, self.name, order=self._order)
        x = x.reshape(1) if x.dim() == 0 else x
        sizes = check_sizes("reduce_scatterv", x, sizes, self.world_size, rank, x.size(dim))
        if self.world_size == 1:
            return x.clone(memory_format=torch.contiguous_format)
        moved = x.movedim(dim, 0)
        rest, longest = list(moved.shape[1:]), max(sizes)
        if len(set(sizes)) == 1:
            parts = moved.contiguous()
        else:  # equal parts on the wire: the shorter ones are padded
            parts = x.new_zeros([self.world_size * longest, *rest])
            for peer, part in enumerate(moved.split(sizes)):
                parts[peer * longest : peer * longest + len(part)].copy_(part)
        out = x.new_empty([longest, *rest])
        self._run("reduce_scatter", out, parts)
        return out[: sizes[rank]].movedim(0, dim).contiguous()

    # -- gathering ----------------------------------------------------------------------------

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """Every rank's `x`, of one shape, concatenated along `dim` in rank order."""
        x = self._tensor("all_gather", x)
        dim = check_dim("all_gather", x, dim, self.rank_in_group)
        if self.world_size == 1:
            return x.clone(memory_format=torch.contiguous_format)
        if is_compiling():
            return _ops.group_all_gather(x, dim, self.world_size, self.name, order=self._order)
        return self._joined(self._all_gather_flat(x.contiguous()), dim)

    def all_gatherv(self, x: Tensor, sizes: Sequence[int], dim: int = 0) -> Tensor:
        """all_gather of parts whose size along `dim` is sizes[r] on rank r."""
        x = self._tensor("all_gatherv", x)
        rank = self.rank_in_group
        dim = check_dim("all_gatherv", x, dim, rank)
        sizes = check_sizes("all_gatherv", x, sizes, self.world_size, rank)
        if is_compiling() and self.world_size > 1:
            return _ops.group_all_gatherv(x, sizes, dim, self.name, order=self._order)
        size = x.size(dim) if x.dim() else 1
        if size != sizes[rank]:
            raise InvalidArgumentError(
                f"all_gatherv(x, sizes={sizes}, dim={dim}): rank {rank} has size {size} and sizes "
                f"says {sizes[rank]}"
            )
        if len(set(sizes)) == 1:
            return self.all_gather(x, dim)
        moved = (x.reshape(1) if x.dim() == 0 else x).movedim(dim, 0)
        padded = x.new_zeros([max(sizes), *moved.shape[1:]])
        padded[: len(moved)].copy_(moved)
        parts = self._all_gather_flat(padded)
        joined = torch.cat([part[:one] for part, one in zip(parts, sizes, strict=True)])
        return joined.movedim(0, dim).contiguous()

    def gather(self, x: Tensor, dst: int = 0, dim: int = -1) -> Tensor | None:
        """all_gather for rank `dst` of the group alone; None on the others."""
        x = self._tensor("gather", x)
        rank = self.rank_in_group
        dim = check_dim("gather", x, dim, rank)
        dst = check_root("gather", "dst", dst, self.world_size, rank)
        if self.world_size == 1:
            return x.clone(memory_format=torch.contiguous_format)
        if is_compiling():
            found = _ops.group_gather(
                x, dst, dim, self.world_size, rank, self.name, order=self._order
            )
            return found if rank == dst else None
        x = x.contiguous()
        out = x.new_empty([self.world_size, *x.shape]) if rank == dst else None
        self._run("gather", out, x, dst)
        return None if out is None else self._joined(out, dim)

    def _all_gather_flat(self, x: Tensor) -> Tensor:
        out = x.new_empty([self.world_size, *x.shape])
        self._run("all_gather", out, x)
        return out

    def _joined(self, parts: Tensor, dim: int) -> Tensor:
        """[W, *shape] -> the parts concatenated along `dim`; no copy for dim 0."""
        shape = list(parts.shape[1:])
        if not shape:
            return parts
        shape[dim] *= self.world_size
        return parts.movedim(0, dim).reshape(shape).contiguous()

    # -- all to all ---------------------------------------------------------------------------

    def all_to_all_single(
        self,
        x: Tensor,
        output_split_sizes: Sequence[int] | None = None,
        input_split_sizes: Sequence[int] | None = None,
    ) -> Tensor:
        """Part p of `x` goes to rank p; the parts that come, in rank order; along dim 0.

        Args:
            output_split_sizes: how much comes from each rank along dim 0; default: as much.
            input_split_sizes: how much of `x` goes to each rank along dim 0; default: equal parts.

        Raises CommMismatchError where two ranks disagree on what one sends the other.
        """
        x = self._tensor("all_to_all_single", x)
        rank, ranks = self.rank_in_group, self.world_size
        length = x.size(0) if x.dim() else 1
        if input_split_sizes is None:
            if length % ranks:
                raise InvalidArgumentError(
                    f"all_to_all_single(x) on rank {rank}: size {length} of x {list(x.shape)} is "
                    f"not a multiple of the {ranks} ranks; input_split_sizes are needed"
                )
            to = [length // ranks] * ranks
        else:
            to = check_sizes("all_to_all_single", x, input_split_sizes, ranks, rank, length)
        come = to if output_split_sizes is None else output_split_sizes
        come = check_sizes("all_to_all_single", x, come, ranks, rank)
        if is_compiling() and ranks > 1:
            return _ops.group_all_to_all_single(x, come, to, self.name, order=self._order)
        x = (x.reshape(1) if x.dim() == 0 else x).contiguous()
        out = x.new_empty([sum(come), *x.shape[1:]])
        if ranks == 1:
            return out.copy_(x)
        row = math.prod(x.shape[1:])
        self._run("all_to_all", out, x, splits=([n * row for n in to], [n * row for n in come]))
        return out

    def all_to_all(self, tensors: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> list[Tensor]:
        """tensors[p] goes to rank p; the result's p came from rank p and has the shape sizes[p].

        All of one dtype. Raises CommMismatchError where two ranks disagree on a size.
        """
        rank, ranks = self.rank_in_group, self.world_size
        parts = [self._tensor("all_to_all", x) for x in tensors]
        if len(parts) != ranks or len(sizes) != ranks or len({x.dtype for x in parts}) != 1:
            raise InvalidArgumentError(
                f"all_to_all(tensors, sizes) on rank {rank}: {ranks} tensors of one dtype and as "
                f"many shapes are expected; {len(parts)} of {sorted({str(x.dtype) for x in parts})}"
                f" and {len(sizes)} were given"
            )
        come = [math.prod(shape) for shape in sizes]
        joined = torch.cat([x.reshape(-1) for x in parts])
        out = self.all_to_all_single(joined, come, [x.numel() for x in parts])
        return [x.view(list(shape)) for x, shape in zip(out.split(come), sizes, strict=True)]

    # -- one to all, one to one ---------------------------------------------------------------

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        """Rank `src`'s content in every rank's `x`, in place; returns `x`."""
        src = check_root("broadcast", "src", src, self.world_size, self.rank_in_group)
        if is_compiling():
            x = self._tensor("broadcast", x)
            if self.world_size > 1:
                _ops.group_broadcast(x, src, self.name, order=self._order)
            return x
        staged = check_in_place("broadcast", x, self.rank_in_group)
        if self.world_size > 1:
            self._run("broadcast", staged, staged, src)
        return x if staged is x else x.copy_(staged)

    def scatter(self, x: Tensor, tensors: Sequence[Tensor] | None = None, src: int = 0) -> Tensor:
        """Rank `src`'s tensors[r] in rank r's `x`, in place; returns `x`.

        Args:
            tensors: on rank `src`, one a rank, each of x's shape and dtype; None on the others.
        """
        rank = self.rank_in_group
        src = check_root("scatter", "src", src, self.world_size, rank)
        if is_compiling():
            given = None if tensors is None else list(tensors)
            _ops.group_scatter(x, given, src, self.name, order=self._order)
            return x
        staged = check_in_place("scatter", x, rank)
        whole = None
        if rank == src:
            parts = [self._tensor("scatter", one) for one in tensors or ()]
            alike = all(one.shape == x.shape and one.dtype == x.dtype for one in parts)
            if len(parts) != self.world_size or not alike:
                raise InvalidArgumentError(
                    f"scatter(x, tensors) on rank {rank}, the source: {self.world_size} tensors of "
                    f"{list(x.shape)} and {x.dtype} are expected, and {len(parts)} were given: "
                    f"{[(list(one.shape), str(one.dtype)) for one in parts]}"
                )
            whole = torch.stack([one.contiguous() for one in parts])
        if self.world_size == 1 and whole is not None:
            staged.copy_(whole[0])
        else:
            self._run("scatter", staged, whole, src)
        return x if staged is x else x.copy_(staged)

    def send(self, x: Tensor, dst: int | None = None) -> None:
        """Sends `x` to rank `dst` of the group; default: the next one."""
        x = self._tensor("send", x)
        dst = (self.rank_in_group + 1) % self.world_size if dst is None else dst
        dst = check_peer("send", "dst", dst, self.rank_in_group, self.world_size)
        if is_compiling():
            _ops.group_send(x, dst, self.name, order=self._order)
        else:
            self._run("send", None, x.contiguous(), dst)

    def recv(
        self,
        size: Sequence[int],
        dtype: torch.dtype,
        src: int | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """A new tensor with what rank `src` (default: the previous one) sent; its shape is `size`.

        Args:
            device: where the sender's tensor was, and this one is: the group's device, or "cpu".
        """
        src = (self.rank_in_group - 1) % self.world_size if src is None else src
        src = check_peer("recv", "src", src, self.rank_in_group, self.world_size)
        where = self.device if device is None else device
        size, where = check_new("recv", size, dtype, where, self.rank_in_group)
        if is_compiling():
            return _ops.group_recv(size, dtype, src, where, self.name, order=self._order)
        self._dispatcher_of("recv", where)
        out = torch.empty(size, dtype=dtype, device=where)
        self._run("recv", out, None, src)
        return out

    def barrier(self) -> None:
        """Returns once every rank has called it; CommTimeoutError names the late ones."""
        if is_compiling():
            _ops.group_barrier(self.name, order=self._order)
        else:
            self.group.barrier()

    # -- who takes it ---------------------------------------------------------------------------

    def _tensor(self, call: str, x: Tensor) -> Tensor:
        """`x`, checked. A tracer's tensor has no memory to look at; the operator's call does it."""
        if is_compiling() and isinstance(x, Tensor):
            return x
        return check_tensor(call, x, self.rank_in_group)

    def _run(
        self,
        op: str,
        out: Tensor | None,
        inp: Tensor | None,
        root: int = 0,
        exact: bool = False,
        by: str = "sum",
        splits: Splits | None = None,
    ) -> None:
        x = out if inp is None else inp
        assert x is not None
        dispatcher = self._host if x.is_cpu else self._dispatcher_at.get(x.device)
        if dispatcher is None:
            dispatcher = self._dispatcher_at[x.device] = self._dispatcher_of(op, x.device)
        dispatcher.run(op, out, inp, root, exact, by, splits)

    def _dispatcher_of(self, op: str, device: torch.device) -> Dispatcher:
        self.group.require_own_process()
        found = self._dispatchers.get(device.type)
        elsewhere = device.type == self.device.type and None not in (
            device.index,
            self.device.index,
        )
        if found is None or (elsewhere and device.index != self.device.index):
            raise InvalidArgumentError(
                f"{op}(x): x is on {device}; rank {self.rank_in_group} of group {self.name} "
                f"communicates from {' and '.join(self._dispatchers) or 'nowhere: it is alone'}"
            )
        return found
