"""Where an op's native kernel is found: one lookup shared by every public function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvcache_ops import reference

_ELEMENTWISE = frozenset(
    {
        "rms_norm",
        "fused_add_rms_norm",
        "rotary_embedding",
        "silu_and_mul",
        "mul_and_silu",
        "gelu_and_mul",
        "gelu_tanh_and_mul",
        "fatrelu_and_mul",
        "swigluoai_and_mul",
    }
)
# Ops whose kernels have landed, by device; the others still run kvcache_ops.reference.
_NATIVE: dict[str, frozenset[str]] = {"cpu": _ELEMENTWISE, "cuda": frozenset()}
_loaded: set[str] = set()


def _no_result(*args: Any, **kwargs: Any) -> None:
    """The fake implementation of an op that only writes into its arguments."""


@torch.compiler.assume_constant_result
def _load(device_type: str) -> bool:
    """Load the native library of a device type, once; True, so that a trace can keep it."""
    from communicators.native import load

    load("cpu")  # holds the schemas
    if "cpu" not in _loaded:
        for name in _NATIVE["cpu"]:
            torch.library.register_fake(f"kvcache_ops::{name}", _no_result)
        _loaded.add("cpu")
    if device_type != "cpu":
        load(device_type)
        _loaded.add(device_type)
    return True


def op(name: str, where: Tensor) -> Callable[..., None]:
    """The callable of op ``name`` for tensors on ``where``'s device."""
    device_type = where.device.type
    if name not in _NATIVE.get(device_type, ()):
        function: Callable[..., None] = getattr(reference, name)
        return function
    if device_type not in _loaded:
        _load(device_type)
    packet: Callable[..., None] = getattr(torch.ops.kvcache_ops, name).default
    return packet
