"""NpuCommunicator: Huawei Ascend, over its HCCL backend of torch.distributed."""

from __future__ import annotations

import importlib

import torch
import torch.distributed as dist

from ..base import Refusal, dtype_name
from ..errors import InvalidArgumentError
from .vendor import VendorCommunicator

_SCALE_BYTES = 4  # one fp32 per row travels behind its int8 values


class NpuCommunicator(VendorCommunicator):
    """all_reduce, quant_all_reduce, all_gather, reduce_scatter and broadcast on Ascend."""

    name = "npu"
    device_type = "privateuseone"  # torch_npu renames it to "npu" when it is imported

    def missing(self) -> Refusal | None:
        try:
            importlib.import_module("torch_npu")
        except ImportError as error:
            return Refusal(f"Huawei Ascend's torch_npu cannot be imported ({error})")
        if not torch.get_device_module(self.device).is_available():
            return Refusal("torch_npu finds no Ascend device")
        return None

    def quant_all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's `x` [..., N] with int8 on the wire, as a new tensor.

        A row of N values (one token) travels as int8 with one fp32 scale, absmax / 127: rank r sums
        its share of the rows in fp32 in rank order, and the sums travel in the same form. All ranks
        hold the same bits. For 16-bit input that is about half the bytes of an all-reduce.

        The error of a value is at most half a step of each encoding: (sum over ranks of the row's
        absmax + absmax of the row's sum) / 254, plus 1% of that for the roundings in fp32, plus
        the rounding to x.dtype. A row that holds inf or NaN on any rank comes out all NaN.

        Raises InvalidArgumentError unless x is fp16, bf16 or fp32.
        """
        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise InvalidArgumentError(
                f"quant_all_reduce(x): x is {dtype_name(x.dtype)}; float16, bfloat16 and float32 "
                "are accepted"
            )
        self._require_same("quant_all_reduce", x)
        if x.numel() == 0:
            return torch.empty_like(x, memory_format=torch.contiguous_format)
        world_size = self.group.world_size
        rows = x.reshape(-1, x.shape[-1] if x.dim() else 1)
        share = -(-rows.size(0) // world_size)
        padding = rows.new_zeros([share * world_size - rows.size(0), rows.size(1)])
        mine = _encode(torch.cat([rows, padding]).float())
        theirs = torch.empty_like(mine)
        dist.all_to_all_single(theirs, mine, group=self.process_group)
        values = _decode(theirs).view(world_size, share, rows.size(1))
        total, *others = values.unbind(0)
        for part in others:
            total = total + part
        encoded = _encode(total)
        everyones = encoded.new_empty([share * world_size, encoded.size(1)])
        self.run("all_gather", everyones, encoded)
        return _decode(everyones).narrow(0, 0, rows.size(0)).to(x.dtype).reshape(x.shape)


def _encode(rows: torch.Tensor) -> torch.Tensor:
    """fp32 [R, N] -> int8 [R, N + 4]: the quantized values, then the bytes of the row's scale."""
    scale = rows.abs().amax(dim=1, keepdim=True) / 127
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    # A row whose scale underflows to 0 is zeros; one with inf or NaN is marked by its scale alone.
    usable = scale > 0
    steps = torch.where(usable, rows / torch.where(usable, scale, 1), 0)
    quantized = steps.round().clamp(-127, 127).to(torch.int8)
    return torch.cat([quantized, scale.view(torch.int8)], dim=1)


def _decode(encoded: torch.Tensor) -> torch.Tensor:
    """int8 [R, N + 4] -> fp32 [R, N]."""
    steps, scale = encoded.split([encoded.size(1) - _SCALE_BYTES, _SCALE_BYTES], dim=1)
    return steps.float() * scale.clone(memory_format=torch.contiguous_format).view(torch.float32)
