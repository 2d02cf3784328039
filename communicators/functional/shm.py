"""The functional interface of CPU shared memory, with the arguments of vLLM's ops of these names.

    handle = init_shm_manager(name, group_size, rank)
    join_shm_manager(handle, name)           # collective: returns once all ranks are there
    shm_allreduce(handle, tensor)
    close_shm_manager(handle)

Any number of groups may be open at once. Tensors are contiguous and on the CPU. A handle is used
by one thread at a time. Every call raises a subclass of CommunicatorError when a peer is late, dies
or makes another call; after that the group is unusable.

`communicators.CpuCommunicator` is the same for tensors of any layout, with a group's agreement.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.compiler import is_compiling

from ..bindings import native
from ..errors import InvalidArgumentError
from ..groups import objects, tensor_dict
from ..groups.arguments import check_reduced, check_tensor, check_written
from ..groups.traced import keep, order_tensor
from ..settings import Settings

__all__ = [
    "SUMMED",
    "close_shm_manager",
    "init_shm_manager",
    "join_shm_manager",
    "load",
    "recv_",
    "recv_message",
    "recv_object",
    "send",
    "send_object",
    "send_packed",
    "shm_address",
    "shm_all_gather",
    "shm_allreduce",
    "shm_gather",
    "shm_recv_tensor_list",
    "shm_send_tensor_list",
]

#: What is added; everything else travels only.
SUMMED = frozenset(
    {
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint8,
    }
)
#: What is reduced in other ways than by a sum, too.
REDUCED = SUMMED | {torch.bool}


@functools.cache
def load() -> None:
    """Loads the native library and tells torch.compile what its operators return."""
    native.load("cpu")

    def writes_only_its_arguments(*_: object, **__: object) -> None:
        return None

    def describe(x: torch.Tensor, handle: int, order: torch.Tensor | None = None) -> torch.Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    for name in (
        "shm_all_reduce",
        "shm_all_reduce_",
        "shm_all_reduce_out",
        "shm_all_gather",
        "shm_gather",
        "shm_reduce_scatter",
        "shm_all_reduce_by",
        "shm_reduce_scatter_by",
        "shm_reduce",
        "shm_scatter",
        "shm_all_to_all",
        "shm_broadcast_",
        "shm_send",
        "shm_recv_",
        "shm_barrier",
    ):
        fake = describe if name == "shm_all_reduce" else writes_only_its_arguments
        torch.library.register_fake(f"communicators::{name}", fake)
        keep(getattr(torch.ops.communicators, name).default)
    order_tensor()


def _order() -> torch.Tensor | None:
    """The last argument of an operator that is traced: it keeps its place (traced.py)."""
    return order_tensor() if is_compiling() else None


#: The rank of each open handle, for the text of errors.
_rank_of: dict[int, int] = {}


def init_shm_manager(
    name: str,
    group_size: int,
    rank: int,
    thread_num: int | Settings | None = None,
    settings: Settings | None = None,
) -> int:
    """Takes this rank's shared memory for a group and returns its handle. Local.

    Args:
        name: of the group; only used in the message of an error here.
        group_size: ranks, 2 to 64, all on this host.
        rank: of this process, 0..group_size-1.
        thread_num: at most so many threads copy and add on this rank; the ranks may differ. By
            default, and never more: torch.get_num_threads(), or the cores that are there for it.
            (It may be left out before `settings`.)
        settings: shm_dir, shm_bytes, timeout_s, spin_us; default: from the environment.
    """
    load()
    if isinstance(thread_num, Settings):
        thread_num, settings = None, thread_num
    if thread_num is not None and (not isinstance(thread_num, int) or thread_num < 1):
        raise InvalidArgumentError(
            f"init_shm_manager(name={name!r}, rank={rank}, thread_num={thread_num!r}): a number of "
            "threads, 1 or more, is expected"
        )
    settings = Settings.from_environment() if settings is None else settings
    try:
        handle: int = torch.ops.communicators.shm_open(
            settings.shm_dir,
            rank,
            group_size,
            settings.shm_bytes,
            settings.timeout_s,
            settings.spin_us,
            thread_num or 0,
        )
    except RuntimeError as error:
        raise native.typed(error) from None
    _rank_of[handle] = rank
    return handle


def shm_address(handle: int) -> str:
    """Where the peers of this rank find it, for a join with addresses. Local."""
    try:
        return torch.ops.communicators.shm_address(handle)
    except RuntimeError as error:
        raise native.typed(error) from None


def join_shm_manager(handle: int, name: str, addresses: Sequence[str] = ()) -> str:
    """Maps the peers' shared memory. Collective; returns `name`.

    `name` is the same on all ranks and no other group of this user on this machine has it at the
    same time.

    Args:
        addresses: the shm_address of every rank, in rank order, where the ranks can tell each
            other. Without, they meet at socket names that follow from `name`: who knows it, any
            user of the machine, can take them first, and this call then raises.
    """
    try:
        torch.ops.communicators.shm_join(handle, name, " ".join(addresses))
    except RuntimeError as error:
        raise native.typed(error) from None
    return name


def close_shm_manager(handle: int) -> None:
    """Gives the memory back. Local: what peers have mapped stays until they close too."""
    _rank_of.pop(handle, None)
    try:
        torch.ops.communicators.shm_close(handle)
    except RuntimeError as error:
        raise native.typed(error) from None


def shm_allreduce(handle: int, data: torch.Tensor) -> None:
    """Sums `data` over the ranks, in place.

    Added in rank order, in fp32 for fp32, fp16 and bf16, rounded once: the same bits on all ranks.
    """
    _require("shm_allreduce", handle, data, written=True, summed=True)
    try:
        torch.ops.communicators.shm_all_reduce_(data, handle, _order())
    except RuntimeError as error:
        raise native.typed(error) from None


def shm_gather(
    handle: int, data: torch.Tensor, outputs: Sequence[torch.Tensor] | None, dst: int
) -> None:
    """Every rank's `data`, of one shape, in the `outputs` of rank `dst`, one tensor per rank.

    On the other ranks `outputs` is None.
    """
    _require("shm_gather", handle, data)
    out = None
    if outputs is not None:
        for output in outputs:
            _require("shm_gather", handle, output, "outputs", written=True)
            if (output.shape, output.dtype) != (data.shape, data.dtype):
                raise InvalidArgumentError(
                    f"shm_gather(outputs) on rank {_rank_of.get(handle)}: one is "
                    f"{list(output.shape)} of {output.dtype}; data is {list(data.shape)} of "
                    f"{data.dtype}, and outputs like it are accepted"
                )
        out = data.new_empty([len(outputs), *data.shape])
    try:
        torch.ops.communicators.shm_gather(out, data, data.numel(), dst, handle, _order())
    except RuntimeError as error:
        raise native.typed(error) from None
    if out is not None and outputs is not None:
        for output, part in zip(outputs, out, strict=True):
            output.copy_(part)


def shm_all_gather(handle: int, data: torch.Tensor, output: torch.Tensor) -> None:
    """Every rank's `data`, one after another in rank order, in `output` (W * data.numel())."""
    _require("shm_all_gather", handle, data)
    _require("shm_all_gather", handle, output, "output", written=True)
    try:
        torch.ops.communicators.shm_all_gather(output, data, data.numel(), handle, _order())
    except RuntimeError as error:
        raise native.typed(error) from None


def shm_send_tensor_list(handle: int, tensors: Sequence[torch.Tensor], dst: int) -> None:
    """Sends tensors, any number of any dtypes, shapes and layouts, to rank `dst`.

    Large ones wait for the receiver, as MPI_Send may. InvalidArgumentError, with nothing sent, if
    one of them cannot be.
    """
    if isinstance(tensors, torch.Tensor) or not isinstance(tensors, Sequence):
        raise InvalidArgumentError(
            f"shm_send_tensor_list(tensors) on rank {_rank_of.get(handle)}: a sequence of tensors "
            f"is expected, not a {type(tensors).__name__}"
        )
    for x in tensors:
        if not isinstance(x, torch.Tensor):
            raise InvalidArgumentError(
                f"shm_send_tensor_list(tensors) on rank {_rank_of.get(handle)}: tensors are "
                f"expected, and a {type(x).__name__} was given"
            )
    send_packed(handle, "shm_send_tensor_list(tensors)", "tensor list", list(tensors), dst)


def shm_recv_tensor_list(handle: int, src: int) -> list[torch.Tensor]:
    """The tensors of the next shm_send_tensor_list of rank `src`, as new tensors.

    CommMismatchError if `src` sent an object or a dict: that is used up.
    """
    return recv_message(handle, "shm_recv_tensor_list", "tensor list", src)


def send(handle: int, x: torch.Tensor, dst: int) -> None:
    """Sends one tensor to rank `dst`, which must call recv_ with one of the same dtype and size."""
    _require("send", handle, x)
    if x.numel() == 0:
        return
    try:
        torch.ops.communicators.shm_send(x.detach().contiguous(), dst, handle, _order())
    except RuntimeError as error:
        raise native.typed(error) from None


def recv_(handle: int, x: torch.Tensor, src: int) -> torch.Tensor:
    """Receives into the contiguous tensor `x` and returns it."""
    _require("recv_", handle, x, written=True)
    if x.numel() == 0:
        return x
    try:
        torch.ops.communicators.shm_recv_(x, src, handle, _order())
    except RuntimeError as error:
        raise native.typed(error) from None
    return x


def _require(
    call: str,
    handle: int,
    x: torch.Tensor,
    argument: str = "data",
    written: bool = False,
    summed: bool = False,
) -> None:
    """InvalidArgumentError for what the operators do not take; before anything moves.

    A tracer's tensor has no memory to look at: there the operator's own checks are left.
    """
    if is_compiling():
        return
    rank = _rank_of.get(handle, -1)
    if written:
        check_written(call, x, rank, argument)
    else:
        check_tensor(call, x, rank, argument)
    if not x.is_cpu:
        raise InvalidArgumentError(
            f"{call}({argument}) on rank {rank}: {argument} is on {x.device}; this communicator is "
            "for the CPU"
        )
    if summed:
        check_reduced(call, x.dtype, SUMMED, rank, argument)


def send_object(handle: int, value: object, dst: int) -> None:
    """Sends a picklable value to rank `dst`; a large one waits for the receiver.

    InvalidArgumentError, with nothing sent, if it cannot be pickled.
    """
    _send_bytes(handle, objects.dumps("send_object(value)", value), dst)


def recv_object(handle: int, src: int) -> Any:
    """The value of the next send_object of rank `src`.

    CommunicatorError if it cannot be unpickled here, CommMismatchError if `src` sent tensors: what
    came is used up then. It came through memory that only the ranks of the group, one user's, have.
    """
    return recv_message(handle, "recv_object", None, src)


def send_packed(handle: int, call: str, kind: str, value: object, dst: int) -> None:
    """Sends a dict or list of tensors to rank `dst`; see tensor_dict.pack for the arguments."""
    packed, parts = tensor_dict.pack(call, kind, value, ("cpu",))
    _send_bytes(handle, objects.dumps(call, packed), dst)
    for part in parts:
        send(handle, tensor_dict.as_bytes(part), dst)


def recv_message(handle: int, call: str, kind: str | None, src: int) -> Any:
    """The next object, or dict or list of tensors, of rank `src`; see tensor_dict.receive."""
    try:
        nbytes = torch.ops.communicators.shm_next_message_bytes(src, handle)
    except RuntimeError as error:
        raise native.typed(error) from None
    payload = recv_(handle, torch.empty(nbytes, dtype=torch.uint8), src)
    message = objects.loads(call, payload.numpy(), f"rank {src}")

    def receive_part(like: tensor_dict.TensorLike) -> torch.Tensor:
        x = like.empty(torch.device("cpu"))
        recv_(handle, tensor_dict.as_bytes(x), src)
        return x

    return tensor_dict.receive(call, kind, message, receive_part, f"rank {src}")


def _send_bytes(handle: int, payload: memoryview, dst: int) -> None:
    send(handle, torch.frombuffer(payload, dtype=torch.uint8), dst)
