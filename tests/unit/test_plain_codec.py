"""Plain data to bytes and back: native/python/plain_*.cpp, and the reader of the same in Python."""

import collections
import enum
import gc
import sys
import tracemalloc
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from communicators.message_queue import native_end, plain

ROOM = 1 << 16

ATOMS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.integers(-200, 200)
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
    | st.binary(max_size=300)
)
KEYS = st.text(max_size=40, alphabet="abcé") | st.integers() | st.booleans() | st.binary(max_size=9)
PLAIN = st.recursive(
    ATOMS,
    lambda inner: (
        st.lists(inner, max_size=300)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=30)
    ),
    max_leaves=60,
)


Point = collections.namedtuple("Point", "x y")


class Integer(int):
    pass


class Color(enum.IntEnum):
    RED = 1


#: Plain at a glance, and not what it seems or what can be told apart from a copy.
OTHERS: dict[str, Any] = {
    "int subclass": Integer(5),
    "enum": Color.RED,
    "str subclass": type("Name", (str,), {})("name"),
    "ordered dict": collections.OrderedDict(a=1),
    "default dict": collections.defaultdict(int, a=1),
    "named tuple": Point(1, 2),
    "float of numpy": np.float64(1.5),
    "array": np.zeros(3),
    "bytearray": bytearray(b"abc"),
    "set": {1, 2},
    "complex": 1j,
    "type": int,
    "large int": 2**63,
    "lone surrogate": "\ud800",
    "tuple as key": {(1, 2): 3},
    "ellipsis": ...,
}


@pytest.fixture(scope="module")
def native() -> ModuleType:
    module = native_end.module()
    if module is None:
        pytest.skip("the library was compiled without Python's headers, or this Python has no lock")
    return module


def alike(a: Any, b: Any) -> bool:
    """Equal, of the same types all the way down, and NaN to NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return [*map(type, a)] == [*map(type, b)] and alike([*a, *a.values()], [*b, *b.values()])
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    return a == b or (a != a and b != b)


@given(PLAIN)
def test_both_readers_get_what_was_written(obj: Any) -> None:
    native = native_end.module()
    if native is None:
        pytest.skip("there is no native module")
    message = native.encode(obj, ROOM)
    if message is None:  # too large, or one tuple or string's list met twice
        return
    assert alike(native.decode(message), obj)
    assert alike(plain.decode(message), obj)
    assert message[0] < plain.PICKLE_BEGIN


@pytest.mark.parametrize(
    "obj",
    [-129, -128, 127, 128, -(2**31) - 1, -(2**31), 2**31 - 1, 2**31, -(2**63), 2**63 - 1]
    + ["x" * n for n in (0, 1, 3, 4, 7, 8, 28, 29, 255, 256)]
    + [{"k" * n: n} for n in (0, 1, 3, 4, 7, 8, 9, 28, 29, 255, 256)]
    + [b"\x80" * 256, [None] * 255, [None] * 256, (1,) * 256, dict.fromkeys(range(256)), ()],
    ids=lambda obj: repr(obj)[:20],
)
def test_the_border_of_each_size(native: ModuleType, obj: Any) -> None:
    message = native.encode(obj, ROOM)
    assert alike(native.decode(message), obj) and alike(plain.decode(message), obj)
    assert native.encode(obj, len(message)) == message
    assert native.encode(obj, len(message) - 1) is None, "it went past the end of its room"


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("inside", ["alone", "list", "tuple", "dict"])
def test_what_is_not_plain_is_left_to_pickle(native: ModuleType, name: str, inside: str) -> None:
    obj = OTHERS[name]
    wrapped = {"alone": obj, "list": [1, obj], "tuple": (1, obj), "dict": {"a": 1, "b": obj}}
    assert native.encode(wrapped[inside], ROOM) is None
    assert not sys.exc_info()[0]


def test_one_object_twice_is_left_to_pickle(native: ModuleType) -> None:
    shared: list[int] = [1]
    assert native.encode([shared, shared], ROOM) is None
    assert native.encode({"a": shared, "b": (0, shared)}, ROOM) is None
    # The inner list has one reference; it is what holds it that is there twice.
    holder = ([2],)
    assert native.encode([holder, holder], ROOM) is None
    loop: list[Any] = []
    loop.append(loop)
    assert native.encode(loop, ROOM) is None
    # What the program refers to as well is met once all the same.
    known = [[i] for i in range(300)]
    assert native.decode(native.encode({"all": known}, ROOM)) == {"all": known}
    assert native.encode({"all": known, "first": known[0]}, ROOM) is None


def test_nesting_is_bounded(native: ModuleType) -> None:
    def nested(depth: int) -> Any:
        obj: Any = 1
        for _ in range(depth):
            obj = [obj]
        return obj

    assert native.decode(native.encode(nested(32), ROOM)) == nested(32)
    assert native.encode(nested(33), ROOM) is None
    with pytest.raises(ValueError, match="not a message"):
        native.decode(b"\x0b\x01" * 10_000 + b"\x00")


def outcome(decode: Any, message: bytes) -> tuple[str, Any]:
    try:
        return "decoded", repr(decode(message))
    except (ValueError, TypeError, MemoryError, RecursionError) as error:
        return "refused", type(error)


WHOLE = {"i": -5, "list": [1, 2.5, (True, None)], "bytes": b"abc", "text": "ü" * 300, 7: 2**40}


def test_a_message_that_is_cut_off_is_refused(native: ModuleType) -> None:
    message = native.encode(WHOLE, ROOM)
    for size in range(len(message)):
        for decode in (native.decode, plain.decode):
            with pytest.raises(ValueError, match="not a message"):
                decode(message[:size])
    for decode in (native.decode, plain.decode):
        with pytest.raises(ValueError, match="not a message"):
            decode(message + b"\x00")


@given(st.binary(max_size=60))
def test_any_bytes_are_decoded_or_refused(message: bytes) -> None:
    native = native_end.module()
    if native is None:
        pytest.skip("there is no native module")
    kind, what = outcome(native.decode, message)
    assert gc.isenabled()
    if kind == "decoded":
        assert outcome(plain.decode, message) == (kind, what)


def test_strings_that_take_one_place_in_the_table_of_keys_are_told_apart(
    native: ModuleType,
) -> None:
    obj = [{f"key {i % 700}": i, f"{i % 700} is another": i} for i in range(3000)]
    assert native.decode(native.encode(obj, 1 << 20)) == obj


def test_the_collector_is_left_as_it_was(native: ModuleType) -> None:
    message = native.encode(WHOLE, ROOM)
    gc.disable()
    try:
        native.decode(message)
        assert not gc.isenabled()
    finally:
        gc.enable()
    native.decode(message)
    assert gc.isenabled()
    with pytest.raises(ValueError, match="not a message"):
        native.decode(message[:-1])
    assert gc.isenabled()


def test_nothing_leaks(native: ModuleType) -> None:
    message = native.encode(WHOLE, ROOM)
    refused = ["a", {"k": [1, 2]}, "\ud800"]

    def work() -> None:
        for _ in range(200):
            native.decode(native.encode(WHOLE, ROOM))
            native.encode(refused, ROOM)
            for size in range(0, len(message), 7):
                outcome(native.decode, message[:size])

    work()
    tracemalloc.start()
    try:
        work()
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        work()
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 2000, f"{grown} bytes more after 200 rounds"
