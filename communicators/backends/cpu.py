"""CpuCommunicator: collectives between the processes of one host, through shared memory."""

from __future__ import annotations

import math
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.compiler import is_compiling

from ..base import BY, OPS, REDUCTIONS, Capability, Communicator, Refusal, Splits
from ..bindings import native
from ..errors import InvalidArgumentError, NativeLibraryError, RefusedError
from ..functional import shm
from ..groups.arguments import (
    check_dim,
    check_in_place,
    check_mapping,
    check_peer,
    check_reduced,
    check_root,
    check_tensor,
)
from ..groups.group import Group
from ..groups.hosts import Home
from ..groups.traced import order_tensor
from ..settings import Settings


class CpuCommunicator(Communicator):
    """Every collective for CPU tensors, between 2 to 64 processes of one host.

    Sums are added in rank order, in fp32 for fp32, fp16 and bf16 (fp64 in fp64, integers exactly),
    and rounded once: the same bits on every rank, for every size. Waiting ranks spin for a short
    time and then sleep. Every call raises CommTimeoutError when a peer is `timeout_s` late,
    PeerDiedError when its process is gone and CommMismatchError when it makes another call; the
    others learn of it, and the communicator stays unusable. One thread at a time may call.

    The memory has no name, so nothing is left in /dev/shm, whichever process is killed.
    """

    name = "cpu_shm"

    def __init__(
        self, group: Group, device: torch.device, settings: Settings | None = None
    ) -> None:
        self._handle = -1  # of the native side, while it is live
        self._ops: dict[str, Callable[..., Any]] = {}
        super().__init__(group, device, settings)

    def capability(self) -> Capability | Refusal:
        if self.device.type != "cpu":
            return Refusal(f"it is for the CPU, and the group's device is {self.device}")
        if not sys.platform.startswith("linux"):
            return Refusal(f"it needs Linux, this is {sys.platform}")
        if not 2 <= self.group.world_size <= 64:
            return Refusal(f"world size {self.group.world_size} is not in 2..64")
        try:
            native.load("cpu")
        except NativeLibraryError as error:
            return Refusal(str(error))
        return Capability(frozenset(OPS), dtypes=shm.REDUCED, by=frozenset(BY))

    def allocate(self) -> Any:
        self._handle = shm.init_shm_manager(
            self.group.name, self.group.world_size, self.group.rank, settings=self.settings
        )
        return Home.mine(), uuid.uuid4().hex[:12], shm.shm_address(self._handle)

    def rendezvous(self, handles: Sequence[Any]) -> None:
        homes = [home for home, _, _ in handles]
        for rank, home in enumerate(homes):
            if home.boot_id != homes[0].boot_id:
                raise RefusedError(f"ranks 0 and {rank} are on different hosts")
            if home != homes[0]:
                raise RefusedError(
                    f"ranks 0 and {rank} are in different network namespaces or of different users"
                )
        self._order = order_tensor(self.device)
        # Rank 0's random number: another job may well have a group of this name.
        name = f"{self.group.name}/{handles[0][1]}"
        shm.join_shm_manager(self._handle, name, [address for _, _, address in handles])
        ops = torch.ops.communicators
        self._ops = {
            "all_reduce_": ops.shm_all_reduce_.default,
            "all_reduce_out": ops.shm_all_reduce_out.default,
            "all_reduce": ops.shm_all_reduce.default,
            "all_gather": ops.shm_all_gather.default,
            "gather": ops.shm_gather.default,
            "reduce_scatter": ops.shm_reduce_scatter.default,
            "broadcast_": ops.shm_broadcast_.default,
            "send": ops.shm_send.default,
            "recv_": ops.shm_recv_.default,
            "all_reduce_by": ops.shm_all_reduce_by.default,
            "reduce_scatter_by": ops.shm_reduce_scatter_by.default,
            "reduce": ops.shm_reduce.default,
            "scatter": ops.shm_scatter.default,
            "all_to_all": ops.shm_all_to_all.default,
            "barrier": ops.shm_barrier.default,
        }

    def release(self) -> None:
        handle, self._handle, self._ops = self._handle, -1, {}
        if handle >= 0:
            shm.close_shm_manager(handle)

    def after_fork(self) -> None:
        super().after_fork()
        self._handle, self._ops = -1, {}

    def run(
        self,
        op: str,
        out: torch.Tensor | None,
        inp: torch.Tensor | None,
        root: int = 0,
        by: str = "sum",
        splits: Splits | None = None,
    ) -> None:
        if by != "sum":
            self._reduce_by(op, out, inp, root, by)
        elif op == "all_reduce":
            if out is inp:
                self._do("all_reduce_", out)
            else:
                self._do("all_reduce_out", out, inp)
        elif op == "broadcast":
            self._do("broadcast_", out, root)
        elif op == "send":
            self._do("send", inp, root)
        elif op == "recv":
            self._do("recv_", out, root)
        elif op == "all_gather" and inp is not None:
            self._do("all_gather", out, inp, inp.numel())
        elif op == "gather" and inp is not None:
            self._do("gather", out, inp, inp.numel(), root)
        elif op == "reduce_scatter" and out is not None:
            self._do("reduce_scatter", out, inp, out.numel())
        elif op == "reduce":
            self._reduce_by(op, out, inp, root, by)
        elif op == "scatter":
            self._do("scatter", out, inp, root)
        elif op == "all_to_all" and splits is not None:
            self._do("all_to_all", out, inp, *splits)
        else:
            raise InvalidArgumentError(f"run({op!r}, out={out}, inp={inp}): see base.OPS")

    def _reduce_by(
        self, op: str, out: torch.Tensor | None, inp: torch.Tensor | None, root: int, by: str
    ) -> None:
        if op not in REDUCTIONS or by not in BY:
            raise InvalidArgumentError(f"run({op!r}, by={by!r}): see base.REDUCTIONS and base.BY")
        number = BY.index(by)
        if op == "reduce":
            self._do("reduce", out, inp, root, number, by=by)
        elif op == "all_reduce":
            self._do("all_reduce_by", out, inp, number, by=by)
        else:
            inner = 0 if out is None else out.numel()
            self._do("reduce_scatter_by", out, inp, inner, number, by=by)

    def _do(self, name: str, *arguments: Any, by: str = "sum") -> Any:
        """The native operator of this name; they all take the handle last."""
        try:
            return self._ops[name](*arguments, self._handle)
        except (RuntimeError, KeyError) as error:
            self.require_live()
            for x in arguments:
                if isinstance(x, torch.Tensor):
                    self._require(name, x, by)
            if isinstance(error, KeyError):
                raise
            raise native.typed(error) from None

    def _require(self, call: str, x: torch.Tensor, by: str = "sum") -> torch.Tensor:
        """check_tensor, and what else the native operators refuse, before anything moves."""
        rank = self.group.rank
        x = check_tensor(call, x, rank)
        if x.device.type != "cpu":
            raise InvalidArgumentError(
                f"{call}(x) on rank {rank}: x is on {x.device}; {self.name} is for the CPU"
            )
        if call.startswith(REDUCTIONS):
            check_reduced(call.removesuffix("_by"), x.dtype, shm.REDUCED, rank, by=by)
        return x

    # -- the same, for tensors of any layout; torch.compile traces them ------------------------

    def _call(self, name: str, *arguments: Any) -> Any:
        """_do, or in a traced graph the operator with what keeps its place (traced.py)."""
        if is_compiling():
            return self._ops[name](*arguments, self._handle, self._order)
        return self._do(name, *arguments)

    def _tensor(self, call: str, x: torch.Tensor) -> torch.Tensor:
        """`x`, checked and contiguous; a tracer's tensor has no memory to look at."""
        return (x if is_compiling() else self._require(call, x)).contiguous()

    def _in_place(self, call: str, x: torch.Tensor) -> torch.Tensor:
        """`x` in the form that can be written as it lies: `x` itself, or a copy."""
        if is_compiling():
            return x.contiguous()
        staged = check_in_place(call, x, self.group.rank)
        return staged if x.is_cpu else self._require(call, x)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's `x`, as a new contiguous tensor."""
        return self._call("all_reduce", self._tensor("all_reduce", x))

    def all_reduce_(self, x: torch.Tensor) -> torch.Tensor:
        """The same in place; returns `x`."""
        # Latency of the smallest: what the operator refuses is looked at once it has.
        if type(x) is torch.Tensor and x.is_cpu and not is_compiling():
            strided = x.layout is torch.strided and x.is_contiguous()
            if strided and not (x.requires_grad or x.is_inference() or x.is_neg()):
                self._do("all_reduce_", x)
                return x
        staged = self._in_place("all_reduce_", x)
        self._call("all_reduce_", staged)
        return x if staged is x else x.copy_(staged)

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Every rank's `x`, of one shape, joined along `dim` in rank order; a new tensor."""
        x = self._tensor("all_gather", x)
        dim = check_dim("all_gather", x, dim, self.group.rank)
        out = self._joined(x, dim)
        self._call("all_gather", out, x, _inner(x, dim))
        return out

    def gather(self, x: torch.Tensor, dst: int = 0, dim: int = -1) -> torch.Tensor | None:
        """all_gather for rank `dst` alone; None on the others."""
        x = self._tensor("gather", x)
        dim = check_dim("gather", x, dim, self.group.rank)
        dst = check_root("gather", "dst", dst, self.group.world_size, self.group.rank)
        out = self._joined(x, dim) if self.group.rank == dst else None
        self._call("gather", out, x, _inner(x, dim), dst)
        return out

    def reduce_scatter(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Part `rank` of the sum of every rank's `x`, split evenly along `dim`; a new tensor."""
        x = self._tensor("reduce_scatter", x)
        dim = check_dim("reduce_scatter", x, dim, self.group.rank)
        ranks = self.group.world_size
        shape = list(x.shape) or [1]
        if shape[dim] % ranks:
            raise InvalidArgumentError(
                f"reduce_scatter(x, dim={dim}) on rank {self.group.rank}: size {shape[dim]} of x "
                f"{list(x.shape)} is not a multiple of the {ranks} ranks"
            )
        shape[dim] //= ranks
        out = x.new_empty(shape)
        self._call("reduce_scatter", out, x, _inner(out, dim))
        return out

    def broadcast(self, x: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Rank `src`'s content in every rank's `x`, in place; returns `x`."""
        src = check_root("broadcast", "src", src, self.group.world_size, self.group.rank)
        staged = self._in_place("broadcast", x)
        self._call("broadcast_", staged, src)
        return x if staged is x else x.copy_(staged)

    def barrier(self) -> None:
        """Returns once every rank has called it."""
        self._call("barrier")

    def send_tensor_list(self, tensors: Sequence[torch.Tensor], dst: int) -> None:
        """Sends tensors, any number of any dtypes and shapes; large ones wait for the receiver."""
        self._check_peer("send_tensor_list", "dst", dst)
        shm.shm_send_tensor_list(self._handle, tensors, dst)

    def recv_tensor_list(self, src: int) -> list[torch.Tensor]:
        """The tensors of the next send_tensor_list of rank `src`."""
        self._check_peer("recv_tensor_list", "src", src)
        return shm.shm_recv_tensor_list(self._handle, src)

    def send_tensor_dict(self, tensors: Mapping[str, Any], dst: int) -> None:
        """Sends a dict of CPU tensors and other picklable values, nested in any way.

        InvalidArgumentError, with nothing sent, if a part of it cannot travel.
        """
        self._check_peer("send_tensor_dict", "dst", dst)
        check_mapping("send_tensor_dict", tensors, self.group.rank)
        shm.send_packed(self._handle, "send_tensor_dict(tensors)", "tensor dict", tensors, dst)

    def recv_tensor_dict(self, src: int) -> dict[str, Any]:
        """The next dict that rank `src` sent with send_tensor_dict.

        CommMismatchError if it sent something else, CommunicatorError if a value cannot be
        unpickled here: what came is used up, and the next dict can be received.
        """
        self._check_peer("recv_tensor_dict", "src", src)
        return shm.recv_message(self._handle, "recv_tensor_dict", "tensor dict", src)

    def _check_peer(self, call: str, argument: str, rank: int) -> None:
        self.require_live()
        check_peer(call, argument, rank, self.group.rank, self.group.world_size)

    def _joined(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        shape = list(x.shape) or [1]
        shape[dim] *= self.group.world_size
        return x.new_empty(shape)


def _inner(x: torch.Tensor, dim: int) -> int:
    """Elements of `x` from `dim` on: what lies together of one rank when parts are joined."""
    return math.prod(x.shape[dim:])
