"""Where an op's native kernel is found: one lookup shared by every public function."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvcache_ops import reference

# Every op has a kernel for these; tensors on other devices run kvcache_ops.reference.
_NATIVE_DEVICES = ("cpu", "cuda")
_loaded: set[str] = set()
_loading = threading.RLock()
_check_slots = False


def _fake(name: str, shown: str | None = None) -> Callable[..., None]:
    """The fake implementation of an op: it writes into its arguments alone, so there is no result.

    A call that mixes meta tensors with others arrives here too, and is refused. ``shown`` is what
    the op's Python function is called, if otherwise.
    """

    def no_result(*args: Any, **kwargs: Any) -> None:
        schema = getattr(torch.ops.kvcache_ops, name).default._schema
        given = dict(zip((a.name for a in schema.arguments), args, strict=False), **kwargs)
        devices = {n: t.device for n, t in given.items() if isinstance(t, Tensor)}
        real = [d for d in devices.values() if d.type != "meta"]
        for argument, device in devices.items():
            if real and device.type == "meta":
                raise RuntimeError(
                    f"{shown or name}({argument}): a tensor on meta was given; "
                    f"a tensor on {real[0]}, as the others, is accepted"
                )

    return no_result


@torch.compiler.assume_constant_result
def _load(device_type: str) -> bool:
    """Load the native library of a device type, once; True, so that a trace can keep it."""
    global _check_slots
    import kvcache_ops
    from communicators.bindings.native import load as load_library
    from communicators.settings import Settings

    with _loading:
        load_library("cpu")  # holds the schemas
        if "cpu" not in _loaded:
            for name in kvcache_ops.__all__:
                torch.library.register_fake(f"kvcache_ops::{name}", _fake(name))
            _check_slots = Settings.from_environment().check_slot_bounds
            _loaded.add("cpu")
        if device_type not in _loaded:
            load_library(device_type)
            batch = "swap_blocks_batch_cuda"
            torch.library.register_fake(f"kvcache_ops::{batch}", _fake(batch, "swap_blocks_batch"))
            _loaded.add(device_type)
    return True


def load() -> None:
    """Loads the native libraries, CUDA's if it is there: `torch.ops.kvcache_ops` has its ops.

    Every call of an op does so when it needs to, and so does `torch.ops.kvcache_ops.<op>` after
    `import kvcache_ops`; call it to have it done by a certain time. NativeLibraryError says why it
    cannot be done.
    """
    from communicators.bindings.native import has_cuda

    _load("cuda" if has_cuda() else "cpu")


class _OpsOnDemand(type(torch.ops.aten)):  # type: ignore[misc]
    """`torch.ops.kvcache_ops`: load() runs when the first operator is asked for."""

    _waits = True

    def __getattr__(self, name: str) -> Any:
        with _loading:
            if self._waits and not name.startswith("__"):
                self._waits = False  # loading asks for operators itself
                try:
                    load()
                except BaseException:
                    self._waits = True  # and the next one says why, too
                    raise
            # Another thread may have been here first.
            return vars(self).get(name) or super().__getattr__(name)


setattr(torch.ops, "kvcache_ops", _OpsOnDemand("kvcache_ops"))  # noqa: B010


def op(name: str, where: Tensor) -> Callable[..., None]:
    """The callable of op ``name`` for tensors on ``where``'s device."""
    device_type = where.device.type
    if device_type == "meta":
        device_type = "cpu"
    if device_type not in _NATIVE_DEVICES:
        function: Callable[..., None] = getattr(reference, name)
        return function
    if device_type not in _loaded:
        _load(device_type)
    packet: Callable[..., None] = getattr(torch.ops.kvcache_ops, name).default
    return packet


def gpu_batch_copy() -> Callable[..., None]:
    """swap_blocks_batch on the current stream: its tensors are the host's, so it is not in op()."""
    if "cuda" not in _loaded:
        _load("cuda")
    packet: Callable[..., None] = torch.ops.kvcache_ops.swap_blocks_batch_cuda.default
    return packet


def slot_op(name: str, where: Tensor, slot_mapping: Tensor, limit: int) -> Callable[..., None]:
    """:func:`op` for a cache write; in debug mode, raises for a slot at or past ``limit``.

    Debug mode is ``KVCACHE_OPS_CHECK_BOUNDS=1``, read when the library is loaded.
    """
    function = op(name, where)
    if _check_slots:
        past = (slot_mapping >= limit).nonzero()
        if past.numel():
            token = int(past[0, 0])
            raise IndexError(
                f"{name}(slot_mapping): token {token} has slot {int(slot_mapping[token])}; "
                f"the cache has slots 0 to {limit - 1}, and negative ones skip a token"
            )
    return function
