"""ProcessGroup: torch.distributed's calls on one of our communicators.

Between the ranks of one host every collective goes by CPU shared memory. Where that refuses (ranks
on several hosts, a rank alone) gloo does all of it. Point-to-point calls are gloo's always: their
tags and recv_anysource need what a channel of ours does not have.

Calls take torch's options and return a Work. `opts.asyncOp` says whether the caller waits at once.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, PrefixStore, ProcessGroupGloo, Store

from ..backends.cpu import CpuCommunicator
from ..base import Refusal
from ..errors import CommunicatorError, InvalidArgumentError
from ..groups.group import Group
from ..settings import Settings
from .memory import SharedMemory
from .work import Work, Worker

_CPU = torch.device("cpu")
_Base: Any = dist.ProcessGroup  # its stubs name arguments that nobody passes by name


class ProcessGroup(_Base):
    """A group of ranks for torch.distributed. Construction is collective; torch makes it.

    Args:
        store: torch's, of this group alone.
        timeout: of every wait for a peer.
        name: the same on all ranks.
        ranks: the members' global ranks, for error messages.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        timeout: datetime.timedelta,
        *,
        name: str = "group",
        ranks: Sequence[int] | None = None,
    ) -> None:
        super().__init__(rank, world_size)
        self._store = store
        settings = dataclasses.replace(
            Settings.from_environment(), timeout_s=timeout.total_seconds()
        )
        self._rank, self._world_size = rank, world_size
        self._name = self._description = name
        self._worker = Worker(name)
        self._closed = ""
        self.group = Group(
            store, rank, world_size, ranks=ranks or None, name=f"c10d-{name}", settings=settings
        )
        self._gloo: Any = self.group.attend(
            lambda: ProcessGroupGloo(PrefixStore("gloo", store), rank, world_size, timeout),
            "ProcessGroupGloo",
        )
        self._memory: SharedMemory | None = None
        self.refusal: Refusal | None = Refusal("the group has one rank")
        if world_size > 1:
            cpu = CpuCommunicator(self.group, _CPU, settings)
            self.refusal = cpu.refusal
            self._memory = SharedMemory(cpu) if cpu.refusal is None else None

    def explain(self) -> str:
        """What serves this group's calls, and why."""
        if self._memory is not None:
            return f"{self._name}: {self._memory.name}; send and recv: gloo"
        return f"{self._name}: gloo, because CPU shared memory is refused: {self.refusal}"

    # -- what torch asks a group ----------------------------------------------------------------

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._world_size

    def name(self) -> str:
        return "communicators"

    def getBackendName(self) -> str:
        return "communicators"

    @property
    def group_name(self) -> str:
        return self._name

    @property
    def group_desc(self) -> str:
        return self._description

    def _set_group_name(self, name: str) -> None:
        self._name = name

    def _set_group_desc(self, description: str) -> None:
        self._description = description

    def get_group_store(self) -> Store:
        return self._store

    @property
    def bound_device_id(self) -> torch.device | None:
        return None

    @property
    def _device_types(self) -> list[torch.device]:
        return [_CPU]

    def _get_backend(self, device: Any) -> Any:
        """The group is its own backend."""
        if torch.device(device).type != "cpu":
            raise InvalidArgumentError(
                f"group {self._name} on rank {self._rank}: backend communicators serves the CPU, "
                f"and {device} was asked for"
            )
        return self

    def _set_default_backend(self, _: Any) -> None:
        """There is one."""

    def _has_hooks(self) -> bool:
        return False

    def _get_sequence_number_for_group(self) -> int:
        return int(self._gloo._get_sequence_number_for_group())

    @property
    def supports_splitting(self) -> bool:
        return False

    @property
    def supports_coalescing(self) -> bool:
        return False

    # -- life -----------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """Waits for the calls under way, and gives everything back. Idempotent."""
        if not self._closed:
            self._closed = "it was shut down"
            self._worker.drain()
            self._worker.close()
            self._release()

    def abort(self) -> None:
        """Gives everything back at once; the peers' calls fail. Idempotent."""
        if not self._closed:
            self._closed = "it was aborted"
            self._release()

    def _release(self) -> None:
        if self._memory is not None:
            self._memory.close()
        self._gloo = None

    # -- how a call is made ---------------------------------------------------------------------

    def _call(
        self, name: str, tensors: Sequence[Tensor], opts: Any, call: Callable[[], None]
    ) -> Work:
        if self._closed:
            raise CommunicatorError(
                f"{name} on rank {self._rank} of group {self._name}: {self._closed}"
            )
        for x in tensors:
            if not x.is_cpu:
                raise InvalidArgumentError(
                    f"{name} on rank {self._rank} of group {self._name}: a tensor is on "
                    f"{x.device}; backend communicators takes CPU tensors"
                )
        return self._worker.call(name, call, list(tensors), getattr(opts, "asyncOp", True))

    def _by_gloo(self, name: str, *arguments: Any) -> Any:
        if self._closed:
            raise CommunicatorError(
                f"{name} on rank {self._rank} of group {self._name}: {self._closed}"
            )
        return getattr(self._gloo, name)(*arguments)

    # -- reductions -----------------------------------------------------------------------------

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:
        opts = opts if opts is not None else dist.AllreduceOptions()
        tensors = _listed(tensors)
        memory = self._memory
        if memory is None or any(x.layout is not torch.strided for x in tensors):
            return self._by_gloo("allreduce", tensors, opts)  # which adds sparse tensors

        def call() -> None:
            for x in tensors:
                memory.all_reduce("all_reduce", x, opts.reduceOp)

        return self._call("all_reduce", tensors, opts, call)

    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> Any:
        opts = opts if opts is not None else dist.AllreduceCoalescedOptions()
        if self._memory is None:
            return self._by_gloo("allreduce_coalesced", tensors, opts)
        return self.allreduce(tensors, opts)

    def reduce(self, tensors: Any, opts: Any = None) -> Any:
        opts = opts if opts is not None else dist.ReduceOptions()
        tensors = _listed(tensors)
        if (memory := self._memory) is None:
            return self._by_gloo("reduce", tensors, opts)

        def call() -> None:
            for x in tensors:
                memory.reduce("reduce", x, opts.reduceOp, opts.rootRank)

        return self._call("reduce", tensors, opts, call)

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        opts = opts if opts is not None else dist.ReduceScatterOptions()
        if (memory := self._memory) is None:
            return self._by_gloo("reduce_scatter", outputs, inputs, opts)

        def call() -> None:
            for out, parts in zip(outputs, inputs, strict=True):
                if len({part.numel() for part in parts}) == 1:
                    whole = torch.cat([part.reshape(-1) for part in parts])
                    memory.reduce_scatter("reduce_scatter", out, whole, opts.reduceOp)
                    continue
                for rank, part in enumerate(parts):
                    if rank != self._rank:  # reduced into somebody else's: it stays as it is
                        memory.reduce("reduce_scatter", part, opts.reduceOp, rank)
                        continue
                    mine = part.clone(memory_format=torch.contiguous_format)
                    memory.reduce("reduce_scatter", mine, opts.reduceOp, rank)
                    out.detach().copy_(mine.view_as(out))

        return self._call("reduce_scatter", outputs, opts, call)

    def reduce_scatter_single(self, out: Tensor, inp: Tensor, opts: Any = None) -> Any:
        return self.reduce_scatter_tensor_coalesced([out], [inp], opts)

    def reduce_scatter_tensor_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        opts = opts if opts is not None else dist.ReduceScatterOptions()
        if (memory := self._memory) is None:
            return self._by_gloo("reduce_scatter_tensor_coalesced", outputs, inputs, opts)

        def call() -> None:
            for out, inp in zip(outputs, inputs, strict=True):
                memory.reduce_scatter("reduce_scatter_tensor", out, inp, opts.reduceOp)

        return self._call("reduce_scatter_tensor", outputs, opts, call)

    # -- gathering ------------------------------------------------------------------------------

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        opts = opts if opts is not None else AllgatherOptions()
        if (memory := self._memory) is None:
            return self._by_gloo("allgather", outputs, inputs, opts)

        def call() -> None:
            for parts, inp in zip(outputs, inputs, strict=True):
                memory.all_gather_into_list(parts, inp.detach())

        return self._call("all_gather", list(itertools.chain(*outputs)), opts, call)

    def all_gather_single(self, out: Tensor, inp: Tensor, opts: Any = None) -> Any:
        return self.allgather_into_tensor_coalesced([out], [inp], opts)

    def allgather_into_tensor_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        opts = opts if opts is not None else AllgatherOptions()
        if (memory := self._memory) is None:
            return self._by_gloo("allgather_into_tensor_coalesced", outputs, inputs, opts)

        def call() -> None:
            for out, inp in zip(outputs, inputs, strict=True):
                if out.numel() != inp.numel() * self._world_size or out.dtype != inp.dtype:
                    raise InvalidArgumentError(
                        f"all_gather_into_tensor on rank {self._rank}: the output has "
                        f"{out.numel()} elements of {out.dtype}; {self._world_size} times "
                        f"{inp.numel()} of {inp.dtype} are needed"
                    )
                memory.all_gather(out, inp)

        return self._call("all_gather_into_tensor", outputs, opts, call)

    def allgather_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        opts = opts if opts is not None else AllgatherOptions()
        if (memory := self._memory) is None:
            return self._by_gloo("allgather_coalesced", outputs, inputs, opts)

        def call() -> None:
            for rank_parts in zip(*outputs, inputs, strict=True):
                *parts, inp = rank_parts
                memory.all_gather_into_list(parts, inp.detach())

        return self._call("all_gather_coalesced", list(itertools.chain(*outputs)), opts, call)

    def gather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        opts = opts if opts is not None else dist.GatherOptions()
        if (memory := self._memory) is None:
            return self._by_gloo("gather", outputs, inputs, opts)

        def call() -> None:
            memory.gather(outputs[0] if outputs else [], inputs[0], opts.rootRank)

        return self._call("gather", [*itertools.chain(*outputs), *inputs], opts, call)

    # -- one to all, all to all -----------------------------------------------------------------

    def broadcast(self, tensors: Any, opts: Any = None) -> Any:
        opts = opts if opts is not None else dist.BroadcastOptions()
        tensors = _listed(tensors)
        if (memory := self._memory) is None:
            return self._by_gloo("broadcast", tensors, opts)

        def call() -> None:
            for x in tensors:
                memory.broadcast(x, opts.rootRank)

        return self._call("broadcast", tensors, opts, call)

    def scatter(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        opts = opts if opts is not None else dist.ScatterOptions()
        if (memory := self._memory) is None:
            return self._by_gloo("scatter", outputs, inputs, opts)

        def call() -> None:
            memory.scatter(outputs[0], inputs[0] if inputs else [], opts.rootRank)

        return self._call("scatter", [*outputs, *itertools.chain(*inputs)], opts, call)

    def alltoall(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        opts = opts if opts is not None else dist.AllToAllOptions()
        if (memory := self._memory) is None:
            return self._by_gloo("alltoall", outputs, inputs, opts)

        def call() -> None:
            memory.all_to_all(outputs, inputs)

        return self._call("all_to_all", [*outputs, *inputs], opts, call)

    def all_to_all_single(
        self, out: Tensor, inp: Tensor, out_sizes: Any, in_sizes: Any, opts: Any = None
    ) -> Any:
        opts = opts if opts is not None else dist.AllToAllOptions()
        if (memory := self._memory) is None:
            return self._by_gloo("alltoall_base", out, inp, out_sizes, in_sizes, opts)
        come, to = memory.sizes("output", out, out_sizes), memory.sizes("input", inp, in_sizes)

        def call() -> None:
            memory.all_to_all_single(out, inp, come, to)

        return self._call("all_to_all_single", [out, inp], opts, call)

    # -- one to one -----------------------------------------------------------------------------

    def send(self, tensors: Any, dst: int, tag: int = 0) -> Any:
        return self._by_gloo("send", [x.contiguous() for x in tensors], dst, tag)

    def recv(self, tensors: Any, src: int, tag: int = 0) -> Any:
        return self._by_gloo("recv", tensors, src, tag)

    def recv_anysource(self, tensors: Any, tag: int = 0) -> Any:
        return self._by_gloo("recv_anysource", tensors, tag)

    # -- meeting --------------------------------------------------------------------------------

    def barrier(self, opts: Any = None) -> Any:
        opts = opts if opts is not None else dist.BarrierOptions()
        if (memory := self._memory) is None:
            return self._by_gloo("barrier", opts)
        return self._call("barrier", [], opts, memory.barrier)

    def monitored_barrier(self, timeout: Any = None, wait_all_ranks: bool = False) -> None:
        """barrier() over the store, in which CommTimeoutError names every rank that is late."""
        self._worker.drain()
        seconds = timeout.total_seconds() if timeout is not None else 0
        self.group.barrier(seconds if seconds > 0 else None)

    # The names of torch before 2.13, and of its C++.
    _allgather_base = all_gather_single
    all_gather_single_coalesced = allgather_into_tensor_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced
    alltoall_base = all_to_all_single


def _listed(tensors: Any) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)
