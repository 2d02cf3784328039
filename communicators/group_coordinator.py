"""GroupCoordinator: what a tensor-parallel job talks to. One object a group of ranks.

It checks arguments, allocates results, brings tensors into the contiguous form that communicators
take, and hands each call to the dispatcher of the tensor's device. Objects travel on the host side.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from . import backends
from .arguments import check_dim, check_peer, check_root, check_sizes
from .backends.pynccl import PyNcclCommunicator
from .dispatcher import Dispatcher
from .errors import CommunicatorError, InvalidArgumentError, TopologyError
from .group import Group, rank_span
from .object_broadcast import ObjectBroadcaster
from .open_groups import OPEN_GROUPS
from .settings import Settings
from .tensor_dict import join_tensors, split_tensors


class GroupCoordinator:
    """The collectives of one group of ranks, on one device a rank. Construction is collective.

    Args:
        ranks: global ranks of the members, in group order; this process must be one of them.
        device: this rank's device.
        name: unique among the open groups of this process, the same on all members.
        settings: default: read from the environment.

    Attributes:
        rank: this process's global rank.      rank_in_group: its rank here.
        ranks, world_size: the members.        device: where tensors are.
        cpu_group, device_group: torch process groups for host memory and for the device.

    Every collective raises InvalidArgumentError for arguments no rank may pass, and the errors of
    the communicator that runs it (CommTimeoutError, PeerDiedError, CommMismatchError).
    """

    def __init__(
        self,
        ranks: Sequence[int],
        device: torch.device | str,
        name: str,
        settings: Settings | None = None,
    ) -> None:
        self.name = name
        self.ranks = list(ranks)
        self.rank = dist.get_rank()
        self.device = torch.device(device)
        self.settings = settings if settings is not None else Settings.from_environment()
        if self.rank not in self.ranks or len(set(self.ranks)) != len(self.ranks):
            raise TopologyError(
                f"group {name!r} of ranks {self.ranks}: distinct ranks are expected, rank "
                f"{self.rank} (this one) among them"
            )
        if name in OPEN_GROUPS:
            raise TopologyError(f"a group {name!r} is open already on rank {self.rank}; close it")
        self.world_size = len(self.ranks)
        self.rank_in_group = self.ranks.index(self.rank)
        assert dist.group.WORLD is not None  # get_rank() above has checked it
        self.group = Group(
            dist.group.WORLD.get_group_store(),
            self.rank_in_group,
            self.world_size,
            ranks=self.ranks,
            name=f"{name}[{rank_span(self.ranks)}]",  # groups of one name may lie side by side
            settings=self.settings,
        )
        self.cpu_group = backends.process_group_over(self.group, "cpu")
        self.group.process_group = self.cpu_group
        self.device_group = self.cpu_group
        if self.device.type != "cpu":
            self.device_group = backends.process_group_over(self.group, self.device.type)
        self._objects = ObjectBroadcaster(self.group)
        self._dispatchers: dict[str, Dispatcher] = {}
        self._dispatcher_at: dict[torch.device, Dispatcher] = {}  # where tensors have been seen
        if self.world_size > 1:
            for at, process_group in self._devices():
                self._dispatchers[at.type] = backends.open_dispatcher(self.group, at, process_group)
        self._closed = False
        OPEN_GROUPS[name] = self

    def _devices(self) -> Iterator[tuple[torch.device, dist.ProcessGroup]]:
        """The device itself, and host memory, where metadata and offloaded tensors live."""
        yield self.device, self.device_group
        if self.device.type != "cpu":
            yield torch.device("cpu"), self.cpu_group

    # -- who is who ---------------------------------------------------------------------------

    @property
    def first_rank(self) -> int:
        """Global rank of the first member."""
        return self.ranks[0]

    @property
    def last_rank(self) -> int:
        """Global rank of the last member."""
        return self.ranks[-1]

    @property
    def pynccl_comm(self) -> PyNcclCommunicator | None:
        """NCCL's communicator on the GPUs, for `use_symmetric_memory`; None where none is live."""
        live = self._dispatchers["cuda"].live if "cuda" in self._dispatchers else ()
        return next((one for one in live if isinstance(one, PyNcclCommunicator)), None)

    @property
    def is_first_rank(self) -> bool:
        return self.rank_in_group == 0

    @property
    def is_last_rank(self) -> bool:
        return self.rank_in_group == self.world_size - 1

    @property
    def next_rank(self) -> int:
        """Global rank of the next member, cyclic."""
        return self.ranks[(self.rank_in_group + 1) % self.world_size]

    @property
    def prev_rank(self) -> int:
        """Global rank of the previous member, cyclic."""
        return self.ranks[(self.rank_in_group - 1) % self.world_size]

    # -- reductions ---------------------------------------------------------------------------

    def all_reduce(self, x: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
        """The sum of every rank's `x`, as a new tensor; never aliases `x`.

        Our own paths add in rank order in fp32 and round once: equal bits on all ranks. `exact`
        leaves out the quantized all-reduce, where the group's settings allow that one.
        """
        if torch.compiler.is_compiling():
            return torch.ops.communicators.group_all_reduce(x, self.name, exact)
        x = x.contiguous()
        out = torch.empty_like(x)
        if self.world_size == 1:
            return out.copy_(x)
        if out.numel():
            self._dispatcher(x).run("all_reduce", out, x, exact=exact)
        return out

    def all_reduce_(self, x: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
        """The same in place; returns `x`."""
        if self.world_size == 1 or x.numel() == 0:
            return x
        if torch.compiler.is_compiling():
            return x.copy_(torch.ops.communicators.group_all_reduce(x, self.name, exact))
        staged = x.contiguous()
        self._dispatcher(x).run("all_reduce", staged, staged, exact=exact)
        return x if staged is x else x.copy_(staged)

    def reduce_scatter(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Part `rank_in_group` of the sum, split evenly along `dim`; a new tensor."""
        dim = check_dim("reduce_scatter", x, dim)
        if x.size(dim) % self.world_size:
            raise InvalidArgumentError(
                f"reduce_scatter(x, dim={dim}): size {x.size(dim)} of x {list(x.shape)} is not a "
                f"multiple of the {self.world_size} ranks; use reduce_scatterv"
            )
        return self.reduce_scatterv(x, [x.size(dim) // self.world_size] * self.world_size, dim)

    def reduce_scatterv(self, x: torch.Tensor, sizes: Sequence[int], dim: int = 0) -> torch.Tensor:
        """reduce_scatter with parts of given sizes: rank r gets sizes[r] along `dim`."""
        dim = check_dim("reduce_scatterv", x, dim)
        check_sizes("reduce_scatterv", x, sizes, self.world_size, x.size(dim))
        if self.world_size == 1:
            return x.clone(memory_format=torch.contiguous_format)
        moved = x.movedim(dim, 0)
        rest, longest = list(moved.shape[1:]), max(sizes)
        if len(set(sizes)) == 1:
            parts = moved.contiguous()
        else:  # equal parts on the wire: the shorter ones are padded
            parts = x.new_zeros([self.world_size * longest, *rest])
            for rank, part in enumerate(moved.split(list(sizes))):
                parts[rank * longest : rank * longest + len(part)].copy_(part)
        out = x.new_empty([longest, *rest])
        if out.numel():
            self._dispatcher(x).run("reduce_scatter", out, parts)
        return out[: sizes[self.rank_in_group]].movedim(0, dim).contiguous()

    # -- gathering ----------------------------------------------------------------------------

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Every rank's `x`, of one shape, concatenated along `dim` in rank order."""
        dim = check_dim("all_gather", x, dim)
        if self.world_size == 1:
            return x.clone(memory_format=torch.contiguous_format)
        if torch.compiler.is_compiling():
            return torch.ops.communicators.group_all_gather(x, dim, self.world_size, self.name)
        return self._joined(self._all_gather_flat(x.contiguous()), dim)

    def all_gatherv(self, x: torch.Tensor, sizes: Sequence[int], dim: int = 0) -> torch.Tensor:
        """all_gather of parts whose size along `dim` is sizes[r] on rank r."""
        dim = check_dim("all_gatherv", x, dim)
        check_sizes("all_gatherv", x, sizes, self.world_size)
        if x.size(dim) != sizes[self.rank_in_group]:
            raise InvalidArgumentError(
                f"all_gatherv(x, sizes={list(sizes)}, dim={dim}): rank {self.rank_in_group} has "
                f"size {x.size(dim)} and sizes says {sizes[self.rank_in_group]}"
            )
        if len(set(sizes)) == 1:
            return self.all_gather(x, dim)
        moved = x.movedim(dim, 0)
        padded = x.new_zeros([max(sizes), *moved.shape[1:]])
        padded[: len(moved)].copy_(moved)
        parts = self._all_gather_flat(padded)
        joined = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        return joined.movedim(0, dim).contiguous()

    def gather(self, x: torch.Tensor, dst: int = 0, dim: int = -1) -> torch.Tensor | None:
        """all_gather for rank `dst` of the group alone; None on the others."""
        dim = check_dim("gather", x, dim)
        check_root("gather", "dst", dst, self.world_size)
        if self.world_size == 1:
            return x.clone(memory_format=torch.contiguous_format)
        x = x.contiguous()
        receives = self.rank_in_group == dst
        out = x.new_empty([self.world_size, *x.shape]) if receives else None
        if x.numel():
            self._dispatcher(x).run("gather", out, x, dst)
        return None if out is None else self._joined(out, dim)

    def _all_gather_flat(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty([self.world_size, *x.shape])
        if x.numel():
            self._dispatcher(x).run("all_gather", out, x)
        return out

    def _joined(self, parts: torch.Tensor, dim: int) -> torch.Tensor:
        """[W, *shape] -> the parts concatenated along `dim`; no copy for dim 0."""
        shape = list(parts.shape[1:])
        if not shape:
            return parts
        shape[dim] *= self.world_size
        return parts.movedim(0, dim).reshape(shape).contiguous()

    # -- one to all, one to one ---------------------------------------------------------------

    def broadcast(self, x: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Rank `src`'s content in every rank's `x`, in place; returns `x`."""
        check_root("broadcast", "src", src, self.world_size)
        if self.world_size == 1 or x.numel() == 0:
            return x
        staged = x.contiguous()
        self._dispatcher(x).run("broadcast", staged, staged, src)
        return x if staged is x else x.copy_(staged)

    def send(self, x: torch.Tensor, dst: int | None = None) -> None:
        """Sends `x` to rank `dst` of the group; default: the next one."""
        dst = (self.rank_in_group + 1) % self.world_size if dst is None else dst
        check_peer("send", "dst", dst, self.rank_in_group, self.world_size)
        if x.numel():
            self._dispatcher(x).run("send", None, x.contiguous(), dst)

    def recv(
        self,
        size: Sequence[int],
        dtype: torch.dtype,
        src: int | None = None,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """A new tensor with what rank `src` (default: the previous one) sent; its shape is `size`.

        Args:
            device: where the sender's tensor was, and this one is: the group's device, or "cpu".
        """
        src = (self.rank_in_group - 1) % self.world_size if src is None else src
        check_peer("recv", "src", src, self.rank_in_group, self.world_size)
        out = torch.empty(list(size), dtype=dtype, device=device or self.device)
        if out.numel():
            self._dispatcher(out).run("recv", out, None, src)
        return out

    def barrier(self) -> None:
        """Returns once every rank has called it; CommTimeoutError names the late ones."""
        self.group.barrier()

    # -- objects and tensor dicts -------------------------------------------------------------

    def broadcast_object(self, obj: Any = None, src: int = 0) -> Any:
        """Rank `src`'s picklable object, on every rank."""
        check_root("broadcast_object", "src", src, self.world_size)
        return obj if self.world_size == 1 else self._objects.broadcast(obj, src)

    def broadcast_object_list(self, objects: list[Any], src: int = 0) -> list[Any]:
        """Overwrites `objects` with rank `src`'s list, of the same length; returns it."""
        theirs = self.broadcast_object(objects, src)
        if len(theirs) != len(objects):
            raise InvalidArgumentError(
                f"broadcast_object_list: rank {self.rank_in_group} passes {len(objects)} objects "
                f"and rank {src} {len(theirs)}"
            )
        objects[:] = theirs
        return objects

    def send_object(self, obj: Any, dst: int) -> None:
        """Sends a picklable object to rank `dst` of the group."""
        self.group.send_object(obj, dst)

    def recv_object(self, src: int) -> Any:
        """The next object that rank `src` of the group sent here."""
        return self.group.recv_object(src)

    def broadcast_tensor_dict(
        self, tensors: dict[str, Any] | None = None, src: int = 0
    ) -> dict[str, Any]:
        """Rank `src`'s dict of tensors and other values, on every rank.

        Tensors on the group's device arrive on the receiver's own; host tensors stay in host
        memory. On `src` the given dict itself is returned.
        """
        check_root("broadcast_tensor_dict", "src", src, self.world_size)
        if self.rank_in_group == src:
            if tensors is None:
                raise InvalidArgumentError(f"broadcast_tensor_dict: rank {src} must pass a dict")
            if self.world_size > 1:
                skeleton, parts = split_tensors(tensors)
                self.broadcast_object(skeleton, src)
                for part in parts:
                    self.broadcast(part, src)
            return tensors
        skeleton = self.broadcast_object(None, src)
        return join_tensors(skeleton, lambda like: self.broadcast(like.empty(self.device), src))

    def send_tensor_dict(self, tensors: dict[str, Any], dst: int | None = None) -> None:
        """Sends a dict of tensors and other values to rank `dst` (default: the next one)."""
        dst = (self.rank_in_group + 1) % self.world_size if dst is None else dst
        check_peer("send_tensor_dict", "dst", dst, self.rank_in_group, self.world_size)
        skeleton, parts = split_tensors(tensors)
        self.send_object(skeleton, dst)
        for part in parts:
            self.send(part, dst)

    def recv_tensor_dict(self, src: int | None = None) -> dict[str, Any]:
        """The next dict that rank `src` (default: the previous one) sent here."""
        src = (self.rank_in_group - 1) % self.world_size if src is None else src
        check_peer("recv_tensor_dict", "src", src, self.rank_in_group, self.world_size)
        return join_tensors(
            self.recv_object(src),
            lambda like: self.recv(like.shape, like.dtype, src, like.device_for(self.device)),
        )

    # -- life ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """A scope in which a CUDA graph that contains this group's collectives is captured."""
        with contextlib.ExitStack() as stack:
            for dispatcher in self._dispatchers.values():
                stack.enter_context(dispatcher.capture())
            yield

    def dispatcher(self) -> Dispatcher:
        """The dispatcher of the group's own device. CommunicatorError for a group of one rank."""
        if self.world_size == 1:
            raise CommunicatorError(f"group {self.name} has one rank and no communicators")
        return self._dispatchers[self.device.type]

    def explain(self) -> str:
        """What is used for which collective, and why each other communicator is not."""
        if self.world_size == 1:
            return f"group {self.name}: one rank, nothing to communicate"
        parts = [dispatcher.explain() for dispatcher in self._dispatchers.values()]
        return "\n".join([*parts, self._objects.explain(), *self.group.explain()])

    def after_fork(self) -> None:
        """In a forked child, where its group refuses all calls: close() does nothing."""
        self._closed = True

    def close(self) -> None:
        """Closes the communicators, then their process groups. Idempotent."""
        if self._closed:
            return
        self._closed = True
        OPEN_GROUPS.pop(self.name, None)
        self._objects.close()
        for dispatcher in self._dispatchers.values():
            dispatcher.close()
        for process_group in {id(g): g for g in (self.device_group, self.cpu_group)}.values():
            dist.destroy_process_group(process_group)

    def _dispatcher(self, x: torch.Tensor) -> Dispatcher:
        found = self._dispatcher_at.get(x.device)  # its type takes four times as long
        if found is None:
            found = self._dispatchers.get(x.device.type)
            if found is None:
                raise InvalidArgumentError(
                    f"group {self.name}: x is on {x.device}; rank {self.rank_in_group} communicates"
                    f" from {' and '.join(self._dispatchers) or 'nowhere: it is alone'}"
                )
            self._dispatcher_at[x.device] = found
        return found
