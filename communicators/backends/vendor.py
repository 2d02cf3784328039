"""VendorCommunicator: what HPU, NPU and XPU share, a vendor's torch.distributed backend.

The backend does the work. What is ours: refusing off the platform with the reason, any dim, new
results that never alias the input, and errors that are sentences.
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from ..base import Capability, Refusal, Splits
from ..errors import CommMismatchError, InvalidArgumentError
from ..groups.arguments import check_dim, check_in_place, check_root, check_tensor
from ..groups.group import Group
from ..settings import Settings
from .torch_distributed import TorchDistributedCommunicator


class VendorCommunicator(TorchDistributedCommunicator):
    """The collectives of one kind of device over its vendor's torch.distributed backend.

    Args:
        group: the ranks; a torch ProcessGroup (None: the default one) or a Group.
        device: this rank's device; default: the current one of the kind.
        process_group: the one whose backend serves `device`; default: `group` itself, or the one
            behind it.

    Construction is collective. Off its platform every rank holds a `refusal` that says what is
    missing, and the methods raise RefusedError. With COMMUNICATORS_DEBUG, ranks that pass different
    shapes or dtypes raise CommMismatchError; without it they are the backend's to notice.
    """

    device_type: ClassVar[str]  # as torch.device takes it without the vendor's package

    def __init__(
        self,
        group: Group | dist.ProcessGroup | None,
        device: torch.device | str | None = None,
        process_group: dist.ProcessGroup | None = None,
        settings: Settings | None = None,
    ) -> None:
        if process_group is None and isinstance(group, dist.ProcessGroup):
            process_group = group
        where = torch.device(self.device_type if device is None else device)
        super().__init__(Group.of(group, settings), where, process_group, settings)

    @abc.abstractmethod
    def missing(self) -> Refusal | None:
        """What this process lacks of the platform, or None. Local; imports the vendor's package."""

    def capability(self) -> Capability | Refusal:
        lacking = self.missing()
        if lacking is not None:
            return lacking
        if self.process_group is not None:
            try:
                self.process_group._get_backend(self.device)
            except RuntimeError:
                return Refusal(
                    f"the process group's backend {dist.get_backend(self.process_group)!r} does "
                    f"not serve {self.device.type}"
                )
        return super().capability()

    def run(
        self,
        op: str,
        out: torch.Tensor | None,
        inp: torch.Tensor | None,
        root: int = 0,
        by: str = "sum",
        splits: Splits | None = None,
    ) -> None:
        if op != "gather":
            return super().run(op, out, inp, root, by, splits)
        # Not every vendor's backend has gather; all have all_gather.
        assert inp is not None
        everywhere = inp.new_empty([self.group.world_size, inp.numel()]) if out is None else out
        return super().run("all_gather", everywhere, inp)

    # -- the collectives on tensors -----------------------------------------------------------

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's `x`, as a new tensor."""
        x = check_tensor("all_reduce", x, self.group.rank)
        self._require_same("all_reduce", x)
        out = x.clone(memory_format=torch.contiguous_format)
        if x.numel():
            self.run("all_reduce", out, out)
        return out

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Every rank's `x`, of one shape, concatenated along `dim` in rank order; a new tensor."""
        x = check_tensor("all_gather", x, self.group.rank)
        dim = check_dim("all_gather", x, dim, self.group.rank)
        self._require_same("all_gather", x, dim)
        x = _contiguous(x)
        parts = x.new_empty([self.group.world_size, *x.shape])
        if x.numel():
            self.run("all_gather", parts, x)
        shape = list(x.shape) or [1]
        shape[dim] *= self.group.world_size
        return _contiguous((parts.movedim(0, dim) if x.dim() else parts).reshape(shape))

    def reduce_scatter(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Part `rank` of the sum, split evenly along `dim`; a new tensor.

        Raises InvalidArgumentError when the size along `dim` is no multiple of the world size.
        """
        x = check_tensor("reduce_scatter", x, self.group.rank)
        dim = check_dim("reduce_scatter", x, dim, self.group.rank)
        world_size = self.group.world_size
        whole = x.reshape(1) if x.dim() == 0 else x
        if whole.size(dim) % world_size:
            raise InvalidArgumentError(
                f"reduce_scatter(x, dim={dim}) on rank {self.group.rank}: size {whole.size(dim)} "
                f"of x {list(x.shape)} is not a multiple of the {world_size} ranks"
            )
        self._require_same("reduce_scatter", x, dim)
        parts = _contiguous(whole.movedim(dim, 0))
        out = parts.new_empty([parts.size(0) // world_size, *parts.shape[1:]])
        if out.numel():
            self.run("reduce_scatter", out, parts)
        return _contiguous(out.movedim(0, dim))

    def broadcast(self, x: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Rank `src`'s content in every rank's `x`, in place; returns `x`."""
        src = check_root("broadcast", "src", src, self.group.world_size, self.group.rank)
        staged = check_in_place("broadcast", x, self.group.rank)
        self._require_same("broadcast", x, src)
        if x.numel():
            self.run("broadcast", staged, staged, src)
        return x if staged is x else x.copy_(staged)

    def _require_same(self, call: str, x: torch.Tensor, *arguments: Any) -> None:
        """RefusedError unless live; in debug, CommMismatchError unless all ranks call alike."""
        self.require_live()
        if not self.settings.debug:
            return
        mine = (list(x.shape), str(x.dtype), *arguments)
        for rank, theirs in enumerate(self.group.gather_objects(f"{self.name}.{call}", mine)):
            if theirs != mine:
                raise CommMismatchError(
                    f"{call}: rank {self.group.rank} passes {mine} and rank {rank} {theirs} (shape,"
                    " dtype, arguments); all ranks must pass the same"
                )


def _contiguous(x: torch.Tensor) -> torch.Tensor:
    """x.contiguous(); unlike that, it also works on fake tensors of a device that torch lacks."""
    return x if x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)
