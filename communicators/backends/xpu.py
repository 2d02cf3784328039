"""XpuCommunicator: Intel GPUs, over the XCCL backend of torch.distributed."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..base import Refusal
from ..errors import InvalidArgumentError
from ..groups.arguments import check_dim, check_root, check_tensor
from .vendor import VendorCommunicator


class XpuCommunicator(VendorCommunicator):
    """all_reduce, gather, all_gather, reduce_scatter and broadcast on Intel GPUs."""

    name = "xpu"
    device_type = "xpu"

    def missing(self) -> Refusal | None:
        if not torch.xpu.is_available():
            return Refusal("torch.xpu finds no Intel GPU, or this torch is built without XPU")
        if not dist.is_xccl_available():
            return Refusal("this torch is built without XCCL, the collectives of Intel GPUs")
        return None

    def gather(
        self, input_: torch.Tensor, rank_in_group: int, dst: int = 0, dim: int = -1
    ) -> torch.Tensor | None:
        """Every rank's `input_` concatenated along `dim` on rank `dst`; None on the others.

        Args:
            rank_in_group: this process's rank in the group.
            dst: rank in the group. It travels as an all-gather, which every backend has.
        """
        dst = check_root("gather", "dst", dst, self.group.world_size, self.group.rank)
        if rank_in_group != self.group.rank:
            raise InvalidArgumentError(
                f"gather(rank_in_group={rank_in_group}): this is rank {self.group.rank} of the "
                "group"
            )
        check_tensor("gather", input_, self.group.rank, "input_")
        dim = check_dim("gather", input_, dim, self.group.rank)
        gathered = self.all_gather(input_, dim)
        return gathered if rank_in_group == dst else None
