"""TorchDistributedCommunicator: the declared fallback, torch.distributed's own backend."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..base import BITS, OPS, REDUCTIONS, Capability, Communicator, Refusal, Splits
from ..errors import CommTimeoutError, CommunicatorError
from ..groups.arguments import check_tensor
from ..groups.group import Group
from ..settings import Settings

# torch 2.13 renamed these two and warns at each call of the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_COMPLEX = frozenset({torch.complex32, torch.complex64, torch.complex128})
_BOTH = frozenset(
    {
        torch.float32, torch.float64, torch.float16, torch.bfloat16,
        torch.int8, torch.int32, torch.int64, torch.uint8,
    }
)  # fmt: skip
#: What a backend adds (torch adds a complex tensor as its two parts). Not bool: gloo adds its bytes
#: and leaves a bool that is 2. A backend that is not here is a vendor's, who says it himself.
SUMMED = {"gloo": _BOTH | _COMPLEX, "nccl": _BOTH | _COMPLEX}
_NUMBERS = frozenset({"sum", "product", "min", "max"})
#: What it reduces by. gloo has no average: that is its sum, divided.
BY_OF = {"gloo": _NUMBERS | BITS | {"avg"}, "nccl": _NUMBERS | {"avg"}}


class TorchDistributedCommunicator(Communicator):
    """Every collective over a torch.distributed process group: gloo, NCCL, or a vendor's.

    It is last in every list: it takes what the others refuse, in any size, across hosts, and moves
    any dtype. Its sums are in the backend's order, so they are not bit-identical to ours.

    Args:
        process_group: the group whose backend serves `device`; default: the one behind `group`.
    """

    name = "torch_distributed"

    def __init__(
        self,
        group: Group,
        device: torch.device,
        process_group: dist.ProcessGroup | None = None,
        settings: Settings | None = None,
    ) -> None:
        self.process_group = process_group if process_group is not None else group.process_group
        super().__init__(group, device, settings)

    def capability(self) -> Capability | Refusal:
        if self.process_group is None:
            return Refusal("the group has no torch.distributed process group behind it")
        backend = dist.get_backend(self.process_group)
        modes = {"eager", "capture"} if backend == "nccl" else {"eager"}
        return Capability(
            frozenset(OPS),
            dtypes=SUMMED.get(backend),
            by=BY_OF.get(backend, frozenset({"sum"})),
            modes=frozenset(modes),
            deterministic=False,
        )

    def run(
        self,
        op: str,
        out: torch.Tensor | None,
        inp: torch.Tensor | None,
        root: int = 0,
        by: str = "sum",
        splits: Splits | None = None,
    ) -> None:
        self.require_live()
        try:
            self._run(op, out, inp, root, by, splits)
        except dist.DistError as error:
            raise CommunicatorError(f"{op} on rank {self.group.rank}: {error}") from error
        except RuntimeError as error:
            for x in (out, inp):
                if x is not None:
                    check_tensor(op, x, self.group.rank)
            # gloo reports a late or dead peer as a RuntimeError with its own text.
            if "imeout" in str(error) or "imed out" in str(error) or "closed by peer" in str(error):
                raise CommTimeoutError(
                    f"{op} on rank {self.group.rank} of {self.group.world_size}: {error}"
                ) from error
            raise

    def _run(
        self,
        op: str,
        out: torch.Tensor | None,
        inp: torch.Tensor | None,
        root: int,
        by: str,
        splits: Splits | None,
    ) -> None:
        group, global_root = self.process_group, self.group.ranks[root]
        if op in REDUCTIONS:
            assert inp is not None
            self._reduce(op, out, inp, root, by)
            return
        if self.capabilities is not None and self.capabilities.dtypes:
            x = out if inp is None else inp
            if splits is not None and x is not None and x.dtype not in _BOTH:
                splits = ([x.itemsize * n for n in splits[0]], [x.itemsize * n for n in splits[1]])
            out, inp = (_movable(x) for x in (out, inp))
        if op == "gather":
            assert inp is not None
            parts = None if out is None else list(out.view(self.group.world_size, -1).unbind(0))
            dist.gather(inp.view(-1), parts, dst=global_root, group=group)
        elif op == "send":
            assert inp is not None
            dist.send(inp, dst=global_root, group=group)
        elif op == "recv":
            assert out is not None
            dist.recv(out, src=global_root, group=group)
        elif op == "broadcast":
            assert out is not None
            dist.broadcast(out, src=global_root, group=group)
        elif op == "scatter":
            assert out is not None
            parts = None if inp is None else list(inp.view(self.group.world_size, -1).unbind(0))
            dist.scatter(out.view(-1), parts, src=global_root, group=group)
        elif op == "all_to_all" and splits is not None:
            assert out is not None and inp is not None
            to, come = (list(sizes) for sizes in splits)
            dist.all_to_all_single(out.view(-1), inp.view(-1), come, to, group=group)
        elif op == "all_gather":
            assert out is not None and inp is not None
            _all_gather(out.view(-1), inp.view(-1), group=group)
        else:
            raise CommunicatorError(f"{op!r} is not one of {OPS}")

    def _reduce(
        self, op: str, out: torch.Tensor | None, inp: torch.Tensor, root: int, by: str
    ) -> None:
        group = self.process_group
        divided = by == "avg" and dist.get_backend(group) == "gloo"
        name = "sum" if divided else by
        reduce_op = getattr(dist.ReduceOp, name.upper())
        if op == "reduce_scatter":
            assert out is not None
            _reduce_scatter(out.view(-1), inp.view(-1), reduce_op, group=group)
        elif op == "all_reduce":
            assert out is not None
            if out is not inp:
                out.copy_(inp)
            staged = out.resolve_conj()
            dist.all_reduce(staged, reduce_op, group=group)
            if staged is not out:
                out.copy_(staged)
        else:  # gloo and NCCL may write into what the others pass
            staged = inp.clone().resolve_conj()
            dist.reduce(staged, dst=self.group.ranks[root], op=reduce_op, group=group)
            if out is not None:
                out.copy_(staged)
        if divided and out is not None:
            whole = not (out.is_floating_point() or out.is_complex())
            out.div_(self.group.world_size, rounding_mode="trunc" if whole else None)


def _movable(x: torch.Tensor | None) -> torch.Tensor | None:
    """`x` as bytes where gloo or NCCL may not know its dtype (fp8, int16, unsigned, complex)."""
    return x if x is None or x.dtype in _BOTH else x.view(-1).view(torch.uint8)
