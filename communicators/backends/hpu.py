"""HpuCommunicator: Intel Gaudi, over its HCCL backend of torch.distributed."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from ..base import Refusal, Splits
from .vendor import VendorCommunicator

_BRIDGE = "habana_frameworks.torch"


class HpuCommunicator(VendorCommunicator):
    """all_reduce, all_gather, reduce_scatter and broadcast on Gaudi; see VendorCommunicator.

    In the bridge's lazy mode operations are collected until the step is marked. Each collective
    marks it first, so that its input has been computed and the collective stays out of the graph of
    what follows.
    """

    name = "hpu"
    device_type = "hpu"
    _bridge: Any = None

    def missing(self) -> Refusal | None:
        try:
            self._bridge = importlib.import_module(_BRIDGE)
            hpu = importlib.import_module(f"{_BRIDGE}.hpu")
            importlib.import_module(f"{_BRIDGE}.distributed.hccl")  # registers the backend "hccl"
        except ImportError as error:
            return Refusal(f"Intel Gaudi's PyTorch bridge cannot be imported ({error})")
        if not hpu.is_available():
            return Refusal(f"{_BRIDGE}.hpu finds no Gaudi device")
        return None

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
        self._bridge.core.mark_step()
        super().run(op, out, inp, root, by, splits)
