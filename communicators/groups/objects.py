"""Objects as bytes, and bytes as messages in a store: what every channel for objects is made of.

A value is pickled whole before anything travels, so one that cannot be pickled has moved nothing. A
tensor is pickled as what it shows: a view of four numbers is sixteen bytes, whatever it is cut
from, an expanded one is what lies under it. One tensor at two places arrives as one tensor;
different tensors that share memory arrive apart, as with torch's own pickling.

Who unpickles runs what the sender wrote, so a channel is as trusted as its ranks are
(docs/security.md).
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._tensor import _rebuild_from_type_v2
from torch._utils import _rebuild_tensor_v2, _rebuild_tensor_v3
from torch.distributed.distributed_c10d import Store

from ..errors import CommunicatorError, InvalidArgumentError

PROTOCOL = 5

#: A TCPStore ends the connection of a client that sends it a string of more than 8 MiB.
PIECE_BYTES = 4 << 20

#: A value of up to so many bytes lies in the message's own key.
INLINE_BYTES = 64 << 10


# -- values ---------------------------------------------------------------------------------------


def dumps(call: str, value: Any, rank: int | None = None) -> memoryview:
    """`value` pickled. InvalidArgumentError, before anything has moved, if it cannot be.

    Args:
        call: whose argument it is, for the sentence: "send_object(value)".
        rank: this one, for the sentence; None where it is not known.
    """
    stream = io.BytesIO()
    try:
        Pickler(stream).dump(value)
    except Exception as error:
        raise InvalidArgumentError(cannot_pickle(call, value, error, rank)) from error
    return stream.getbuffer()


def loads(call: str, payload: Any, sender: str) -> Any:
    """What `sender` ("rank 3") pickled. CommunicatorError if it cannot be unpickled here."""
    try:
        return pickle.loads(payload)
    except Exception as error:
        raise CommunicatorError(cannot_unpickle(call, sender, error)) from error


def cannot_pickle(call: str, value: Any, error: BaseException, rank: int | None = None) -> str:
    """The sentence of dumps()."""
    what = f"{call}: a {type(value).__name__} that cannot be pickled whole was given"
    return f"{what}{'' if rank is None else f' on rank {rank}'}: {_text(error)}"


def cannot_unpickle(call: str, sender: str, error: BaseException) -> str:
    """The sentence of loads()."""
    return (
        f"{call}: what {sender} sent arrived whole and cannot be unpickled in this process; it is "
        f"used up, and the next message can be received: {_text(error)}"
    )


def _text(error: BaseException) -> str:
    return text_of(error, lambda: f"{type(error).__name__}: {error}" if str(error) else repr(error))


def text_of(error: BaseException, text: Callable[[], str]) -> str:
    """text(), or the error's class alone where the text's own code, the program's, fails."""
    try:
        return text()
    except Exception:  # noqa: BLE001
        return type(error).__name__


@dataclass(frozen=True)
class Refused:
    """Travels in place of a value that its sender had to refuse, so that all ranks raise alike."""

    text: str


def unless_refused(value: Any) -> Any:
    """`value`; InvalidArgumentError with the sender's sentence if it is a refusal."""
    if type(value) is Refused:
        raise InvalidArgumentError(value.text)
    return value


# -- tensors --------------------------------------------------------------------------------------


class Pickler(pickle.Pickler):
    """pickle.Pickler, with tensors as what they show."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, protocol=PROTOCOL)

    def reducer_override(self, obj: Any) -> Any:
        """Called for whatever is not of a type that pickle knows by itself."""
        return reduce_tensor(obj) if isinstance(obj, torch.Tensor) else NotImplemented


def is_plain(x: Any) -> bool:
    """Whether dtype, shape and the numbers in its memory are all there is to the tensor `x`."""
    return (
        type(x) is torch.Tensor
        and x.layout is torch.strided
        and x.device.type != "meta"
        and not x.is_nested
        and not x.is_quantized
        and not x.requires_grad
        and not x.is_conj()
        and not x.is_neg()
        and not x._is_zerotensor()
        and not x.__dict__
    )


def check_memory(x: torch.Tensor) -> None:
    """InvalidArgumentError if `x`, which is plain, has no memory to read (any more)."""
    if x.numel() == 0:
        return
    needed = (x.storage_offset() + _span(x)) * x.element_size()
    held = x.untyped_storage().nbytes()
    if held < needed or x.data_ptr() == 0:
        raise InvalidArgumentError(
            f"a tensor of shape {list(x.shape)} needs {needed} bytes of its storage, which holds "
            f"{held} (it was freed or shrunk)"
        )


def reduce_tensor(x: torch.Tensor) -> Any:
    """How `x` is pickled (see object.__reduce_ex__): in the end, by tensors that are plain."""
    if type(x) is torch.Tensor and not x.__dict__:
        if x.requires_grad:
            return _requires_grad, (x.detach(),)
        if x.is_conj() or x.is_neg():
            return _itself, (x.resolve_conj().resolve_neg(),)
        if is_plain(x):
            check_memory(x)
            if x.device.type == "cpu":
                return _reduce_plain(x)
        if (is_plain(x) or x.is_quantized) and _is_cut(x):
            x = x.clone()  # torch pickles the whole storage
        return x.__reduce_ex__(PROTOCOL)
    reduced = x.__reduce_ex__(PROTOCOL)
    if reduced[0] is _rebuild_from_type_v2:  # a subclass, or a tensor with attributes
        rebuild, kind, _, state = reduced[1]
        if rebuild in (_rebuild_tensor_v2, _rebuild_tensor_v3):
            with torch._C.DisableTorchFunctionSubclass():
                inner = x.detach().as_subclass(torch.Tensor)
            rebuild = _requires_grad if x.requires_grad else _itself
            return _rebuild_from_type_v2, (rebuild, kind, (inner,), state)
    return reduced


def _is_cut(x: torch.Tensor) -> bool:
    return x.untyped_storage().nbytes() > x.numel() * x.element_size()


def _reduce_plain(x: torch.Tensor) -> Any:
    span = _span(x)
    if span > x.numel():
        x, span = x.contiguous(), x.numel()
    flat = x.as_strided([span], [1]).view(torch.uint8)
    return _plain, (pickle.PickleBuffer(flat.numpy().data), x.dtype, tuple(x.shape), x.stride())


def _span(x: torch.Tensor) -> int:
    """Elements from the first that `x` shows to the last, those between included."""
    if x.numel() == 0:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))


def _plain(
    memory: Any, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]
) -> torch.Tensor:
    if len(memory) == 0:
        return torch.empty_strided(shape, stride, dtype=dtype)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).as_strided(shape, stride)


def _requires_grad(x: torch.Tensor) -> torch.Tensor:
    return x.requires_grad_()


def _itself(x: torch.Tensor) -> torch.Tensor:
    return x


# -- messages in a store --------------------------------------------------------------------------


@dataclass(frozen=True)
class Message:
    """What stands under a message's key: its tag, and its payload or where that is.

    The pieces of a long payload stand under key/0, key/1, ... and are written before the key is.
    """

    tag: str
    nbytes: int
    inline: bytes = b""
    pieces: int = 0
    refusal: str | None = None  # of a sender that has no payload

    @classmethod
    def of(cls, tag: str, payload: memoryview) -> Message:
        if len(payload) <= INLINE_BYTES:
            return cls(tag, len(payload), inline=bytes(payload))
        return cls(tag, len(payload), pieces=-(-len(payload) // PIECE_BYTES))

    def packed(self) -> bytes:
        return pickle.dumps((self.tag, self.nbytes, self.inline, self.pieces, self.refusal))

    @classmethod
    def unpacked(cls, raw: bytes) -> Message:
        return cls(*pickle.loads(raw))


def stored(key: str, message: Message, payload: memoryview) -> Iterator[tuple[str, bytes]]:
    """What to set in a store, in this order: the message's own key comes last."""
    for piece in range(message.pieces):
        start = piece * PIECE_BYTES
        yield f"{key}/{piece}", bytes(payload[start : start + PIECE_BYTES])
    yield key, message.packed()


def read(store: Store, key: str, message: Message) -> Any:
    """The payload of a message, which stays in the store."""
    if message.pieces == 0:
        return message.inline
    payload = memoryview(bytearray(message.nbytes))
    for piece in range(message.pieces):
        part = store.get(f"{key}/{piece}")
        payload[piece * PIECE_BYTES : piece * PIECE_BYTES + len(part)] = part
    return payload


def erase(store: Store, key: str, message: Message) -> None:
    """Takes the pieces of a message out of the store; its own key stays."""
    for piece in range(message.pieces):
        store.delete_key(f"{key}/{piece}")
