"""MessageQueue's memory: whose it is while views live, and how much of it there is."""

import gc
import os
import signal
import traceback
import types
from typing import Any

import numpy as np
import pytest
import torch

from communicators.message_queue import blocks, ends
from communicators.message_queue.native_ring import api
from communicators.shm_broadcast import MessageQueue
from tests.unit.queue_processes import SETTINGS, both_ends, either_end

__all__ = ["either_end"]  # pytest finds fixtures by their names here

MIB = 1 << 20


def backed(queue: MessageQueue) -> int:
    """Bytes of memory that the ring takes, slots included."""
    return os.fstat(queue._writer.ring.fd).st_blocks * 512


# --- views ----------------------------------------------------------------------------------------


class _Late:
    """In place of weakref.finalize: the test decides when to call it."""

    def __init__(self, lease: Any, release: Any, *held: Any) -> None:
        self.call = lambda: release(*held)
        _late.append(self)


_late: list[_Late] = []


def _mapped() -> int:
    with open("/proc/self/maps") as maps:
        return sum("memfd:message-queue" in line for line in maps)


def _views_die(order: str) -> None:
    """What releases the block comes last, as with numpy 2.5; or first, while arrays lie there."""
    before = _mapped()
    writer, (reader,) = both_ends()
    numbers = np.arange(100_000)
    writer.enqueue({"a": numbers, "t": torch.from_numpy(numbers), "e": torch.empty(0, 3)})
    views = reader.dequeue(copy=False)
    array, tensor = views["a"][5:], views["t"].view(torch.int32)[2:]
    del views
    if order == "release first":
        _late.pop().call()
    reader.close()
    writer.close()
    del reader, writer
    gc.collect()
    # Not by torch: threads of its pool are missing in a forked child.
    assert array.sum() > 0 and tensor.numpy().sum() > 0
    del array, tensor
    gc.collect()
    if order == "release last":
        assert _mapped() == before + 1, "the mapping went before what needs it"
        _late.pop().call()
    gc.collect()
    assert not _late and _mapped() == before


@pytest.mark.parametrize("order", ["release last", "release first"])
def test_the_release_of_a_view_may_come_at_any_time(
    order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "weakref", types.SimpleNamespace(finalize=_Late))
    if (child := os.fork()) == 0:  # it may crash
        signal.alarm(60)
        try:
            _views_die(order)
            os._exit(0)
        except BaseException:  # noqa: BLE001  # a child must not go on as a second pytest
            traceback.print_exc()
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def _made_from(view: Any, kind: str) -> Any:
    """Something else that shares the memory of `view`."""
    if isinstance(view, torch.Tensor):
        return {
            "slice": lambda: view[3:],
            "numpy": lambda: view.numpy(),
            "memoryview": lambda: memoryview(view.numpy()),
            "dtype": lambda: view.view(torch.int16),
            "other": lambda: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(view)),
        }[kind]()
    return {
        "slice": lambda: view[3:],
        "numpy": lambda: np.asarray(view).view(np.ndarray),
        "memoryview": lambda: memoryview(view),
        "dtype": lambda: view.view(np.int16),
        "other": lambda: np.frombuffer(view, np.uint8),
    }[kind]()


@pytest.mark.parametrize("kind", ["slice", "numpy", "memoryview", "dtype", "other"])
@pytest.mark.parametrize("sent", [np.arange(10_000), torch.arange(10_000)], ids=["array", "tensor"])
def test_whatever_is_made_from_a_view_holds_the_block(sent: Any, kind: str) -> None:
    writer, (reader,) = both_ends()
    writer.enqueue(sent)
    made = _made_from(reader.dequeue(copy=False), kind)
    gc.collect()
    before = bytes(memoryview(np.asarray(made)).cast("B"))
    for _ in range(3):
        writer.enqueue(np.zeros(20_000, np.int64))
        reader.dequeue()
    reader.close()
    writer.close()
    del reader, writer
    gc.collect()
    assert bytes(memoryview(np.asarray(made)).cast("B")) == before


def test_a_view_in_a_cycle_is_released_by_the_collector() -> None:
    writer, (reader,) = both_ends()
    writer.enqueue(np.zeros(100_000, np.uint8))
    loop: list[Any] = [reader.dequeue(copy=False)]
    place = loop[0].__array_interface__["data"][0]
    loop.append(loop)
    del loop
    gc.collect()
    writer.enqueue(np.zeros(100_000, np.uint8))
    assert reader.dequeue(copy=False).__array_interface__["data"][0] == place


def test_a_forked_child_lets_go_of_nothing_that_its_parent_holds() -> None:
    writer, (reader,) = both_ends()
    writer.enqueue(np.full(100_000, 7, np.uint8))
    views = [reader.dequeue(copy=False)]
    if (child := os.fork()) == 0:
        signal.alarm(60)
        views.clear()
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    writer.enqueue(np.full(100_000, 8, np.uint8))
    assert (views[0] == 7).all(), "the block was written over"
    assert (reader.dequeue(copy=False) == 8).all()


# --- how much -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("either_end")
@pytest.mark.parametrize("limit", [16 * MIB, 1 << 16, 3 * MIB + 7], ids=str)
@pytest.mark.parametrize("kind", ["bytes", "str", "array", "raw"])
def test_memory_follows_what_is_in_flight(limit: int, kind: str) -> None:
    """One message at a time: as much memory as one takes, after the first as after the 40th."""
    writer, (reader,) = both_ends(max_chunk_bytes=limit)
    size = 2 * MIB
    makes: dict[str, Any] = {"bytes": b"b" * size, "str": "s" * size}
    makes["array"] = np.zeros(size, np.uint8)
    for i in range(40):
        if kind == "raw":
            with writer.acquire_write() as chunk:
                chunk[-1] = i
            with reader.acquire_read() as chunk:
                assert len(chunk) == limit and chunk[-1] == i
        else:
            writer.enqueue(makes[kind])
            assert len(reader.dequeue()) == size
    largest = max(limit if kind == "raw" and limit > (1 << 16) else size, 4 * MIB)
    assert backed(writer) <= 2 * largest + 40 * (1 << 16) + MIB
    assert writer._writer.ring.slot_bytes <= 1 << 16


@pytest.mark.usefixtures("either_end")
@pytest.mark.parametrize("after", ["small", "large"])
def test_a_burst_gives_its_memory_back(after: str) -> None:
    """As many messages of up to max_chunk_bytes may be unread as there are slots."""
    writer, (reader,) = both_ends(max_chunk_bytes=16 * MIB, max_chunks=12)
    for i in range(12):
        writer.enqueue(bytes([i]) * (8 * MIB), timeout=10)
    assert backed(writer) >= 96 * MIB
    assert all(reader.dequeue() == bytes([i]) * (8 * MIB) for i in range(12))
    for i in range(1200 if after == "small" else 150):
        writer.enqueue(i if after == "small" else b"x" * 100_000)
        reader.dequeue()
    assert backed(writer) <= 6 * MIB


@pytest.mark.parametrize("held_for", [0, 3])
def test_a_stream_keeps_its_memory(held_for: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking and giving back the same pages for every message would cost more than the copy."""
    monkeypatch.setattr(ends, "UNREAD_LIMIT_BYTES", 32 * MIB)
    writer, (reader,) = both_ends()
    held: list[Any] = []
    seen = set()
    for i in range(150):
        writer.enqueue(np.full(2 * MIB, i % 256, np.uint8))
        held.append(reader.dequeue(copy=False))
        del held[: max(0, len(held) - held_for)]
        if i > 20:
            seen.add(api().backed_bytes(writer._writer.handle))
    assert len(seen) == 1, f"memory was taken and given back: {sorted(seen)}"


def test_chunks_larger_than_a_slot_are_found_by_the_ring_buffer() -> None:
    writer, (reader,) = both_ends(max_chunk_bytes=MIB, max_chunks=2)
    ring = writer._writer.ring
    with writer.acquire_write() as chunk:
        chunk[:3], chunk[-3:] = b"abc", b"xyz"
    with ring.get_data(0) as data:
        assert len(data) == MIB and bytes(data[:3]) == b"abc" and bytes(data[-3:]) == b"xyz"
    with pytest.raises(RuntimeError, match="changed"), writer.acquire_write() as chunk:
        raise RuntimeError("changed my mind")
    with reader.acquire_read() as chunk:
        assert bytes(chunk[:3]) == b"abc"
    for i in range(10):
        with writer.acquire_write() as chunk:
            chunk[0] = i
        with reader.acquire_read() as chunk:
            assert chunk[0] == i
    assert backed(writer) <= 5 * MIB


def test_a_remote_reader_gets_large_chunks_too() -> None:
    pytest.importorskip("zmq")
    writer = MessageQueue(2, 1, max_chunk_bytes=MIB, settings=SETTINGS)
    near, far = (
        MessageQueue.create_from_handle(writer.export_handle(), r, settings=SETTINGS)
        for r in (0, 1)
    )
    with writer.acquire_write() as chunk:
        chunk[-2:] = b"yz"
    for reader in (near, far):
        with reader.acquire_read() as chunk:
            assert len(chunk) == MIB and bytes(chunk[-2:]) == b"yz"
    for end in (near, far, writer):
        end.close()
