"""Objects to bytes and back for MessageQueue: pickle protocol 5 with buffers out of band (PEP 574).

A message is a pickle stream and the large buffers that it refers to. numpy arrays give their
buffers by themselves; CPU tensors, which torch would copy into the stream, are reduced to a buffer,
a dtype and a shape here.
"""

from __future__ import annotations

import copyreg
import ctypes
import math
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from ..errors import CommunicatorError, InvalidArgumentError
from ..groups import objects

#: After a stream of more bytes the pickler is renewed.
RENEW_BYTES = 1 << 14

#: Buffers below this many bytes go into the stream: one more copy costs less than a block.
OUT_OF_BAND_BYTES = 4096


def address_of(buffer: Any) -> int:
    """The address of a contiguous buffer, also of a read-only one."""
    address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return address


def _reduce_tensor(tensor: torch.Tensor) -> Any:
    """What pickles a tensor: a plain one as a buffer of what it shows, others by plain ones."""
    if not (objects.is_plain(tensor) and tensor.device.type == "cpu"):
        return objects.reduce_tensor(tensor)
    objects.check_memory(tensor)
    shown = tensor.contiguous()
    flat = shown.as_strided([shown.numel()], [1]).view(torch.uint8)
    return _rebuild_tensor, (
        pickle.PickleBuffer(flat.numpy().data),
        tensor.dtype,
        tuple(tensor.shape),
    )


def _rebuild_tensor(buffer: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=dtype)
    if isinstance(buffer, memoryview) and buffer.readonly:
        # A zero-copy view. torch has no read-only tensors and warns of one made from read-only
        # memory; the writable lease that the view was cut from serves without.
        lease: Any = buffer.obj
        begin = address_of(buffer) - ctypes.addressof(lease)
        flat = torch.frombuffer(lease, dtype=torch.uint8, count=buffer.nbytes, offset=begin)
        return flat.view(dtype).reshape(shape)
    return torch.frombuffer(buffer, dtype=torch.uint8).view(dtype).reshape(shape)


class _Reducers(dict[type, Callable[[Any], Any]]):
    """Ours for tensors, and those of copyreg, which may still be added to."""

    def __missing__(self, kind: type) -> Callable[[Any], Any]:
        known = copyreg.dispatch_table.get(kind)
        if known is None and issubclass(kind, torch.Tensor):
            return _reduce_tensor
        return copyreg.dispatch_table[kind]


class _Sink:
    """The file of a pickler that keeps the pieces it is given, without joining them."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self.write = write


class Encoder:
    """Turns one object at a time into `parts` (of the stream) and `buffers`. Not thread-safe.

    The pickler is kept: making one costs as much as pickling a small object.
    """

    def __init__(self) -> None:
        self.parts: list[Any] = []
        self.buffers: list[memoryview] = []
        self.renew()

    def renew(self) -> None:
        """Takes a new pickler. A pickler's memo never shrinks, and clearing it takes its size."""
        pickler = pickle.Pickler(
            _Sink(self.parts.append), protocol=5, buffer_callback=self._out_of_band
        )
        pickler.dispatch_table = _Reducers({torch.Tensor: _reduce_tensor})
        # dump(obj) fills `parts` and `buffers`; after it comes clear_memo(), always.
        self.dump, self.clear_memo = pickler.dump, pickler.clear_memo

    def _out_of_band(self, buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < OUT_OF_BAND_BYTES:
            return True
        self.buffers.append(raw)
        return False

    def clear(self) -> None:
        """Lets go of the object, and of what a dump() that failed has left."""
        self.clear_memo()
        self.parts.clear()
        self.buffers.clear()


def cannot_pickle(obj: Any, error: Exception) -> InvalidArgumentError:
    """What enqueue() raises."""
    return InvalidArgumentError(
        f"enqueue(obj): a {type(obj).__name__} that holds something that cannot be pickled was "
        f"given: {objects.text_of(error, lambda: repr(error))}"
    )


def decode(stream: Any, buffers: Iterable[Any] = ()) -> Any:
    """The object. CommunicatorError if it cannot be unpickled here; the message is used up then."""
    try:
        return pickle.loads(stream, buffers=buffers)
    except Exception as error:
        raise cannot_unpickle(error) from error


def cannot_unpickle(error: Exception) -> CommunicatorError:
    """What dequeue() raises."""
    return CommunicatorError(
        "dequeue(): a message arrived whole and cannot be unpickled in this process: "
        f"{objects.text_of(error, lambda: repr(error))}"
    )
