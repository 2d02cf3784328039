"""A dict of tensors, taken apart for travel: a picklable skeleton, and the tensors in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class TensorLike:
    """What stands in the skeleton where a tensor was."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device_type: str

    def device_for(self, device: torch.device) -> torch.device:
        """Host tensors stay in host memory; a device tensor goes to the receiver's own device."""
        return torch.device("cpu") if self.device_type == "cpu" else device

    def empty(self, device: torch.device) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device_for(device))


def split_tensors(values: dict[str, Any]) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """The dict with a TensorLike for each tensor (nested dicts included), and the tensors."""
    parts: list[torch.Tensor] = []

    def strip(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            parts.append(value)
            return TensorLike(tuple(value.shape), value.dtype, value.device.type)
        if type(value) is dict:
            return {key: strip(item) for key, item in value.items()}
        return value

    return {key: strip(value) for key, value in values.items()}, parts


def join_tensors(
    skeleton: dict[str, Any], receive: Callable[[TensorLike], torch.Tensor]
) -> dict[str, Any]:
    """The dict again: `receive` is called once a tensor, in the order of split_tensors."""

    def fill(value: Any) -> Any:
        if isinstance(value, TensorLike):
            return receive(value)
        if type(value) is dict:
            return {key: fill(item) for key, item in value.items()}
        return value

    return {key: fill(value) for key, value in skeleton.items()}
