"""Where an op's native kernel is found: one lookup shared by every public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvcache_ops import reference

# Ops whose kernels have landed, by device; the others still run kvcache_ops.reference.
_NATIVE: dict[str, frozenset[str]] = {"cpu": frozenset(), "cuda": frozenset()}


@torch.compiler.assume_constant_result
def _load(device_type: str) -> bool:
    """Load the native library of a device type, once; True, so that a trace can keep it."""
    from communicators.native import load

    load("cpu")  # holds the schemas
    if device_type != "cpu":
        load(device_type)
    return True


def op(name: str, where: Tensor) -> Any:
    """The callable of op ``name`` for tensors on ``where``'s device."""
    device_type = where.device.type
    if name not in _NATIVE.get(device_type, ()):
        return getattr(reference, name)
    _load(device_type)
    return getattr(torch.ops.kvcache_ops, name)
