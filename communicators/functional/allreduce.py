"""The functional interface of the custom all-reduce, under sgl_kernel's and vLLM's names.

    from communicators.allreduce import *      # in place of: from sgl_kernel.allreduce import *

A handle `fa` is an integer. The functions map to the same kernels as `CustomAllreduce`, which is
the easier way in; what differs from the originals is said in each docstring. Tensors that are
reduced need no registration here: every rank reads only its own input, so the `register_*`
functions accept what they are given, and `_reg`, `_unreg` and `deterministic_*` are one and the
same exact sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..bindings import collectives, native
from ..bindings.workspace import LAYOUT, SharedBuffer
from ..errors import InvalidArgumentError
from ..groups.arguments import check_plain
from ..groups.traced import order_tensor
from .mscclpp import mscclpp_allreduce, mscclpp_generate_unique_id, mscclpp_init_context
from .quick import (
    init_custom_qr,
    qr_all_reduce,
    qr_destroy,
    qr_get_handle,
    qr_max_size,
    qr_open_handles,
)

__all__ = [
    "all_reduce",
    "all_reduce_reg",
    "all_reduce_unreg",
    "allocate_meta_buffer",
    "allocate_shared_buffer_and_handle",
    "deterministic_all_reduce_reg",
    "deterministic_all_reduce_unreg",
    "dispose",
    "free_shared_buffer",
    "get_graph_buffer_ipc_meta",
    "get_meta_buffer_ipc_handle",
    "init_custom_ar",
    "init_custom_qr",
    "meta_size",
    "mscclpp_allreduce",
    "mscclpp_generate_unique_id",
    "mscclpp_init_context",
    "open_mem_handle",
    "qr_all_reduce",
    "qr_destroy",
    "qr_get_handle",
    "qr_max_size",
    "qr_open_handles",
    "register_buffer",
    "register_graph_buffers",
]

_HANDLE_BYTES = 64

#: What belongs to a handle and is not the caller's: the buffers that init_custom_ar mapped.
_mapped: dict[int, SharedBuffer] = {}


def meta_size() -> int:
    """Bytes of a rank's workspace, which is all the memory that a handle needs."""
    return int(collectives.load().custom_ar_bytes(*LAYOUT))


def init_custom_ar(
    ipc_tensors: Sequence[int] | torch.Tensor,
    rank_data: torch.Tensor,
    rank: int | Sequence[Any],
    full_nvlink: bool | Sequence[int],
    *rocm: Any,
) -> int:
    """A handle on the current device.

    CUDA: `init_custom_ar(ipc_tensors, rank_data, rank, full_nvlink)`. ipc_tensors are this
    process's addresses of all ranks' buffers, each of at least `meta_size()` bytes and zeroed when
    it was allocated (`CustomAllreduce.create_shared_buffer(meta_size())`).
    ROCm: `init_custom_ar(meta, rank_data, handles, offsets, rank, full_nvlink)` with `meta` from
    `allocate_meta_buffer(meta_size())`, and everybody's 64-byte handles and offsets (zeros).

    `rank_data` is not used. `full_nvlink` must be true for more than two ranks.
    Raises InvalidArgumentError, CommunicatorError.
    """
    library = collectives.load()
    buffer: SharedBuffer | None = None
    if isinstance(ipc_tensors, torch.Tensor):
        handles, offsets, (own_rank, nvlink) = rank, full_nvlink, rocm
        assert isinstance(handles, Sequence) and isinstance(offsets, Sequence)
        _need_zero(offsets)
        buffer = SharedBuffer(0, ipc_tensors.device, own_rank, b"", 0)
        buffer.map_peers([_as_bytes(handle) for handle in handles], own=ipc_tensors.data_ptr())
        pointers = buffer.pointers
    else:
        own_rank, nvlink = rank, full_nvlink
        pointers = list(ipc_tensors)
    assert isinstance(own_rank, int)
    if len(pointers) > 2 and not nvlink:
        raise InvalidArgumentError(
            f"init_custom_ar(full_nvlink=False): {len(pointers)} GPUs need full NVLink; two may do "
            "without"
        )
    fa = library.create_custom_ar(pointers, own_rank, LAYOUT)
    if buffer is not None:
        _mapped[fa] = buffer
    return fa


def all_reduce(
    fa: int, inp: torch.Tensor, out: torch.Tensor, reg_buffer: int = 0, reg_buffer_sz_bytes: int = 0
) -> None:
    """out = the sum of all ranks' inp. Same shape and dtype (fp32, fp16, bf16), contiguous.

    The last two arguments are not used: any size is reduced, without a registered buffer.
    Raises CommTimeoutError for a peer that did not come to an earlier call, CommunicatorError for
    two calls in flight at once, InvalidArgumentError for a handle that is not open or other
    tensors. In a graph of torch.compile they are RuntimeErrors that begin with those names.
    """
    if torch.compiler.is_compiling():
        order = order_tensor(inp.device)
        torch.ops.communicators.custom_ar_all_reduce(fa, inp, out, order)
    else:
        for argument, x in (("inp", inp), ("out", out)):
            if type(x) is not torch.Tensor or x.is_neg():
                check_plain(f"all_reduce of handle {fa}", x, torch.cuda.current_device(), argument)
        try:
            torch.ops.communicators.custom_ar_all_reduce(fa, inp, out)
        except RuntimeError as error:
            raise native.typed(error) from None


def all_reduce_reg(fa: int, inp: torch.Tensor, out: torch.Tensor) -> None:
    """`all_reduce` under ROCm's name."""
    all_reduce(fa, inp, out)


def all_reduce_unreg(
    fa: int, inp: torch.Tensor, reg_buffer: torch.Tensor | None, out: torch.Tensor
) -> None:
    """`all_reduce` under ROCm's name; reg_buffer is not used."""
    all_reduce(fa, inp, out)


def deterministic_all_reduce_reg(fa: int, inp: torch.Tensor, out: torch.Tensor) -> None:
    """`all_reduce`, which is always deterministic: rank order, fp32, one rounding."""
    all_reduce(fa, inp, out)


def deterministic_all_reduce_unreg(
    fa: int, inp: torch.Tensor, reg_buffer: torch.Tensor | None, out: torch.Tensor
) -> None:
    """`all_reduce`, which is always deterministic; reg_buffer is not used."""
    all_reduce(fa, inp, out)


def dispose(fa: int) -> None:
    """Ends a handle. The caller's buffers stay the caller's; `free_shared_buffer` frees them only
    when no CUDA graph that recorded a call of this handle exists: its replays end at once."""
    device = torch.device("cuda", torch.cuda.current_device())
    buffer = _mapped.pop(fa, None)
    collectives.load().end(fa, device, buffer.close if buffer is not None else None)


def register_buffer(fa: int, *buffer: Any) -> None:
    """Accepts a buffer in CUDA's or ROCm's form; there is nothing to register."""


def get_graph_buffer_ipc_meta(fa: int) -> tuple[list[int], list[int]]:
    """([], []): captured inputs are read by their own rank only, so none is shared."""
    return [], []


def register_graph_buffers(
    fa: int, handles: Sequence[Sequence[Any]], offsets: Sequence[Sequence[int]]
) -> None:
    """Accepts the lists of `get_graph_buffer_ipc_meta`, which are empty."""
    if any(len(rank_handles) for rank_handles in handles):
        raise InvalidArgumentError(
            "register_graph_buffers(fa, handles, offsets): handles that "
            "get_graph_buffer_ipc_meta() of this library returned are expected, and those are empty"
        )


def allocate_shared_buffer_and_handle(size: int) -> tuple[int, torch.Tensor]:
    """(address, handle) of `size` zeroed bytes on the current device; handle is uint8 [64], CPU."""
    collectives.load()
    pointer, handle = torch.ops.communicators.allocate_shared_buffer_and_handle(size)
    return pointer, handle


def open_mem_handle(mem_handle: torch.Tensor) -> int:
    """This process's address of a peer's buffer."""
    collectives.load()
    return int(torch.ops.communicators.open_mem_handle(mem_handle))


def free_shared_buffer(buffer: int) -> None:
    """Frees what `allocate_shared_buffer_and_handle` returned the address of; not before the CUDA
    graphs are gone that recorded calls of a disposed handle over it."""
    collectives.load().free([buffer], lambda: torch.ops.communicators.free_shared_buffer(buffer))


class _DeviceMemory:
    """Shared device memory in the form that torch.as_tensor takes; freed with its last tensor."""

    def __init__(self, size: int) -> None:
        self.pointer, self.handle = allocate_shared_buffer_and_handle(size)
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (self.pointer, False), "version": 3
        }  # fmt: skip

    def __del__(self) -> None:
        if torch.cuda.is_initialized():
            free_shared_buffer(self.pointer)


#: Handle of each meta buffer, by address, as long as the process lives (64 bytes each).
_meta_handles: dict[int, torch.Tensor] = {}


def allocate_meta_buffer(size: int) -> torch.Tensor:
    """uint8 [size] on the current device, zeroed, in memory that peers can map."""
    memory = _DeviceMemory(size)
    _meta_handles[memory.pointer] = memory.handle
    return torch.as_tensor(memory, device=torch.device("cuda", torch.cuda.current_device()))


def get_meta_buffer_ipc_handle(inp: torch.Tensor) -> torch.Tensor:
    """uint8 [64] on the CPU: the handle of a tensor from `allocate_meta_buffer`."""
    handle = _meta_handles.get(inp.data_ptr())
    if handle is None:
        raise InvalidArgumentError(
            "get_meta_buffer_ipc_handle(inp): a tensor from allocate_meta_buffer() is expected"
        )
    return handle


def _as_bytes(handle: Any) -> bytes:
    if isinstance(handle, torch.Tensor):
        handle = handle.tolist()
    data = handle.encode("latin-1") if isinstance(handle, str) else bytes(handle)
    if len(data) != _HANDLE_BYTES:
        raise InvalidArgumentError(
            f"init_custom_ar(handles): {_HANDLE_BYTES} bytes a handle are expected, got {len(data)}"
        )
    return data


def _need_zero(offsets: Sequence[int]) -> None:
    if any(offsets):
        raise InvalidArgumentError(
            f"init_custom_ar(offsets={list(offsets)}): zeros are expected, since meta buffers are "
            "allocations of their own"
        )
