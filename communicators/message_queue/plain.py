"""Reads what native/python/plain_encoder.cpp writes: for interpreters that cannot load that module.

The bytes are described in native/python/plain_codec.h.
"""

from __future__ import annotations

import struct
from typing import Any

#: A pickle of protocol 2 or later begins so; a message of plain data does not.
PICKLE_BEGIN = 0x80

_ATOMS = (None, False, True)
_NUMBERS = {3: struct.Struct("=b"), 4: struct.Struct("=i"), 5: struct.Struct("=q"),
            6: struct.Struct("=d")}  # fmt: skip
_STR, _BYTES, _LIST, _TUPLE, _DICT = 7, 9, 11, 13, 15
_U32 = struct.Struct("=I")


def decode(message: bytes | memoryview) -> Any:
    """The object. ValueError if the bytes are no message of plain data."""
    try:
        value, end = _value(bytes(message), 0)
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"not a message of plain data: {error}") from error
    if end != len(message):
        raise ValueError(f"not a message of plain data: {len(message) - end} bytes follow it")
    return value


def _value(data: bytes, at: int) -> tuple[Any, int]:
    tag = data[at]
    at += 1
    if tag < len(_ATOMS):
        return _ATOMS[tag], at
    if tag in _NUMBERS:
        number = _NUMBERS[tag]
        return number.unpack_from(data, at)[0], at + number.size
    if tag % 2:
        size, at = data[at], at + 1
    else:
        size, at = _U32.unpack_from(data, at)[0], at + _U32.size
        tag -= 1
    if tag in (_STR, _BYTES):
        piece = data[at : at + size]
        if len(piece) != size:
            raise ValueError("not a message of plain data: it ends within a string")
        return (piece.decode() if tag == _STR else piece), at + size
    if tag not in (_LIST, _TUPLE, _DICT):
        raise ValueError(f"not a message of plain data: no value begins with {tag}")
    items = []
    for _ in range(2 * size if tag == _DICT else size):
        item, at = _value(data, at)
        items.append(item)
    if tag == _DICT:
        return dict(zip(items[::2], items[1::2], strict=True)), at
    return (items if tag == _LIST else tuple(items)), at
