"""Dicts and lists of tensors, taken apart for travel: a pickle of the rest, and the tensors' bytes.

Everything is looked at, pickled and checked before the first byte travels. Plain tensors are taken
out wherever pickle finds them, in nested dicts and lists, in objects, in sparse tensors, and go by
the channel for tensors; the same tensor twice goes once. What is unpickled is unpickled after the
last tensor has arrived, so an error there leaves nothing on the way.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CommMismatchError, CommunicatorError, InvalidArgumentError
from . import objects


@dataclass(frozen=True)
class TensorLike:
    """What the receiver must know of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device_type: str

    def device_for(self, device: torch.device) -> torch.device:
        """Host tensors stay in host memory; a device tensor goes to the receiver's own device."""
        return torch.device("cpu") if self.device_type == "cpu" else device

    def empty(self, device: torch.device) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device_for(device))


@dataclass(frozen=True)
class Packed:
    """A dict or list of tensors without them; one transfer for each of `likes` follows it."""

    kind: str  # "tensor dict" or "tensor list"
    likes: tuple[TensorLike, ...]
    stream: bytes


def pack(
    call: str, kind: str, value: Any, devices: Collection[str], rank: int | None = None
) -> tuple[Packed, list[torch.Tensor]]:
    """`value` taken apart. InvalidArgumentError if a part of it cannot travel.

    Args:
        call: whose argument it is, for the sentence: "send_tensor_dict(tensors)".
        devices: types of the devices that tensors may be on.
    """
    stream = io.BytesIO()
    pickler = _Pickler(stream, devices)
    try:
        pickler.dump(value)
    except Exception as error:
        raise InvalidArgumentError(objects.cannot_pickle(call, value, error, rank)) from error
    likes = tuple(TensorLike(tuple(x.shape), x.dtype, x.device.type) for x in pickler.parts)
    return Packed(kind, likes, stream.getvalue()), pickler.parts


def unpack(call: str, packed: Packed, parts: Sequence[torch.Tensor], sender: str) -> Any:
    """What was packed. CommunicatorError if it cannot be unpickled here."""
    unpickler = _Unpickler(io.BytesIO(packed.stream))
    unpickler.parts = parts
    try:
        return unpickler.load()
    except Exception as error:
        raise CommunicatorError(objects.cannot_unpickle(call, sender, error)) from error


def receive(
    call: str,
    kind: str | None,
    message: Any,
    receive_part: Callable[[TensorLike], torch.Tensor],
    sender: str,
) -> Any:
    """The value of a message that has arrived, its tensors with it: receive_part(like) for each.

    Args:
        kind: what the call receives: "tensor dict", "tensor list", or None for any other object.

    If the message is of another kind, it is used up, with its tensors, and CommMismatchError
    raised.
    """
    objects.unless_refused(message)
    found = message.kind if isinstance(message, Packed) else None
    if found == kind:
        if found is None:
            return message
        return unpack(call, message, [receive_part(like) for like in message.likes], sender)
    if found is not None:
        for like in message.likes:
            receive_part(like)
    what = f"a {found}" if found else f"an object of type {type(message).__name__}"
    raise CommMismatchError(
        f"{call}: {sender} sent {what}, and {f'a {kind}' if kind else 'an object'} is expected; "
        f"it is used up, and the next message can be received"
    )


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """What the plain tensor `x` shows as contiguous bytes; a view of it where it is contiguous.

    Transfers of tensors in dicts and lists are made of them, so every dtype goes by every way.
    """
    # reshape(-1) of one element keeps whatever stride it has, and view() wants 1.
    return x.contiguous().as_strided([x.numel()], [1]).view(torch.uint8)


class _Pickler(objects.Pickler):
    """Collects the plain tensors in `parts` and pickles their places there."""

    def __init__(self, file: Any, devices: Collection[str]) -> None:
        super().__init__(file)
        self.parts: list[torch.Tensor] = []
        self._devices = devices
        self._place: dict[int, int] = {}  # of a tensor by its id; `parts` keeps it alive

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, torch.Tensor):
            return None
        if obj.device.type not in self._devices:
            raise InvalidArgumentError(
                f"a tensor of shape {list(obj.shape)} is on {obj.device}, and tensors on "
                f"{' and '.join(sorted(self._devices))} are accepted"
            )
        if not objects.is_plain(obj):
            return None  # pickled, by tensors that are
        place = self._place.get(id(obj))
        if place is None:
            objects.check_memory(obj)
            place = self._place[id(obj)] = len(self.parts)
            self.parts.append(obj)
        return place


class _Unpickler(pickle.Unpickler):
    parts: Sequence[torch.Tensor] = ()

    def persistent_load(self, pid: Any) -> torch.Tensor:
        return self.parts[pid]
