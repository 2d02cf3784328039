"""MessageQueue inside a host: objects, order, waits, errors, the ends of its life."""

import gc
import math
import pickle
import time
import warnings

import numpy as np
import pytest
import torch

from communicators.errors import CommTimeoutError, InvalidArgumentError
from communicators.message_queue import ends
from communicators.message_queue.native_ring import api
from communicators.shm_broadcast import MessageQueue, ShmRingBuffer
from tests.unit.queue_processes import SETTINGS, both_ends, either_end, local_queue, readers

__all__ = ["either_end"]  # pytest finds fixtures by their names here
pytestmark = pytest.mark.usefixtures("either_end")

DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int8,
    torch.uint8, torch.int64, torch.bool, torch.complex64,
]  # fmt: skip

OBJECTS = [
    None,
    {"step": 1, "tokens": [1, 2, 3], "text": "ü" * 50},
    b"",
    b"x" * 100_000,
    bytearray(b"y" * 200_000),
    ["a" * 70_000, "b" * 70_000],
    list(range(100_000)),
    {f"key {i}": i for i in range(50)},
]


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(
                a.contiguous().reshape(-1).view(torch.uint8),
                b.contiguous().reshape(-1).view(torch.uint8),
            )
        )
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("obj", OBJECTS, ids=lambda o: f"{type(o).__name__}")
def test_objects_arrive_as_they_were_sent(obj: object, copy: bool) -> None:
    writer, (reader,) = both_ends()
    writer.enqueue(obj)
    assert same(obj, reader.dequeue(copy=copy))


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (64, 1000)], ids=str)
def test_tensors_of_all_dtypes_and_shapes(
    dtype: torch.dtype, shape: tuple[int, ...], copy: bool
) -> None:
    writer, (reader,) = both_ends()
    numbers = torch.randint(0, 2, shape)
    tensor = numbers.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        writer.enqueue({"t": tensor, "n": 7})
        arrived = reader.dequeue(copy=copy)
    assert arrived["n"] == 7
    assert same(tensor, arrived["t"])


def test_tensors_that_are_more_than_their_memory() -> None:
    writer, (reader,) = both_ends()
    strided = torch.arange(100_000).reshape(100, 1000)[::2, ::3]
    wants_grad = torch.ones(5000, requires_grad=True)
    conjugate = torch.ones(5000, dtype=torch.complex64).conj()
    sparse = torch.eye(10).to_sparse()
    parameter = torch.nn.Parameter(torch.ones(3000))
    sent = [strided, wants_grad, conjugate, sparse, parameter]
    writer.enqueue(sent)
    arrived = reader.dequeue()
    assert torch.equal(arrived[0], strided)
    assert arrived[1].requires_grad and torch.equal(arrived[1], wants_grad)
    assert torch.equal(arrived[2].resolve_conj(), conjugate.resolve_conj())
    assert torch.equal(arrived[3].to_dense(), sparse.to_dense())
    assert type(arrived[4]) is torch.nn.Parameter


def test_the_sender_may_change_its_object_and_the_receiver_its_copy() -> None:
    writer, readers_ = both_ends(2)
    array = np.ones(1 << 20, np.uint8)
    writer.enqueue(array)
    array[:] = 2
    first = readers_[0].dequeue()
    first[:] = 3
    assert (readers_[1].dequeue() == 1).all()


def test_copy_false_gives_views_of_one_memory_which_go_back_when_they_die() -> None:
    writer, (reader,) = both_ends()
    tensor, array = torch.arange(100_000), np.arange(50_000)
    writer.enqueue([tensor, array])
    views = reader.dequeue(copy=False)
    assert torch.equal(views[0], tensor) and np.array_equal(views[1], array)
    with pytest.raises(ValueError, match="read-only"):
        views[1][0] = 1
    place = views[0].data_ptr()
    writer.enqueue([tensor + 1, array])
    second = reader.dequeue(copy=False)
    assert second[0].data_ptr() != place, "a block that is held was used again"
    assert torch.equal(views[0], tensor)
    kept = views[0][10:20]  # a view of a view holds the block, too
    del views, second
    gc.collect()
    writer.enqueue([tensor + 2, array])
    assert reader.dequeue(copy=False)[0].data_ptr() != place
    assert kept.tolist() == list(range(10, 20))
    del kept
    gc.collect()
    writer.enqueue([tensor + 3, array])
    assert reader.dequeue(copy=False)[0].data_ptr() == place


def test_views_outlive_the_queue() -> None:
    writer, (reader,) = both_ends()
    writer.enqueue(np.arange(100_000))
    view = reader.dequeue(copy=False)
    reader.close()
    writer.close()
    del reader, writer
    gc.collect()
    assert view.sum() == 4999950000
    del view
    gc.collect()


def test_held_views_never_stop_the_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ends, "UNREAD_LIMIT_BYTES", 1 << 20)
    writer, (reader,) = both_ends()
    held = []
    for i in range(20):
        writer.enqueue(np.full(300_000, i, np.uint8), timeout=5)
        held.append(reader.dequeue(copy=False))
    assert [int(view[0]) for view in held] == list(range(20))
    assert api().backed_bytes(writer._writer.handle) >= 20 * 300_000
    del held
    gc.collect()
    writer.enqueue(np.zeros(300_000, np.uint8))
    assert api().backed_bytes(writer._writer.handle) <= 2 << 20, "memory was not given back"


def test_unread_large_messages_are_bounded_and_the_late_reader_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ends, "UNREAD_LIMIT_BYTES", 1 << 20)
    writer, (reader,) = both_ends()
    for i in range(3):
        writer.enqueue(np.full(300_000, i, np.uint8))
    with pytest.raises(CommTimeoutError, match=r"waited 0\.05 s for readers .* rank 0"):
        writer.enqueue(np.zeros(300_000, np.uint8), timeout=0.05)
    for i in range(3):
        assert reader.dequeue()[0] == i
    huge = np.arange(1 << 20)  # 8 times the limit: goes when nothing else waits
    writer.enqueue(huge, timeout=5)
    assert np.array_equal(reader.dequeue(), huge)


def _collect(queue: MessageQueue, count: int) -> list[object]:
    queue.wait_until_ready()
    return [queue.dequeue() for _ in range(count)]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_every_process_gets_every_message_in_order(method: str) -> None:
    queue = local_queue(3, max_chunks=4, max_chunk_bytes=256)
    with readers(queue, [0, 1, 2], _collect, 500, method=method) as processes:
        queue.wait_until_ready()
        sent = [i if i % 50 else np.full(i + 1, i) for i in range(500)]
        for obj in sent:
            queue.enqueue(obj)
        for process in processes:
            assert all(map(same, sent, process.result()))


def test_the_handle_serves_children_that_come_later() -> None:
    queue = local_queue(2)
    queue.enqueue("before anybody joined")
    for rank in (0, 1):
        with readers(queue, [rank], MessageQueue.dequeue) as (process,):
            assert process.result() == "before anybody joined"


def test_timeouts() -> None:
    writer, (reader,) = both_ends(max_chunks=2)
    began = time.monotonic()
    with pytest.raises(CommTimeoutError, match=r"reader rank 0 waited 0\.1 s for a message"):
        reader.dequeue(timeout=0.1)
    assert 0.1 <= time.monotonic() - began < 2
    writer.enqueue(1)
    writer.enqueue(2)
    with pytest.raises(CommTimeoutError, match=r"not read the last 2 messages: rank 0 \("):
        writer.enqueue(3, timeout=0)
    assert [reader.dequeue(), reader.dequeue()] == [1, 2]
    writer.enqueue(4)
    assert reader.dequeue(timeout=math.inf) == 4, "the message that timed out was sent after all"
    with pytest.raises(InvalidArgumentError, match="seconds, 0 or more"):
        reader.dequeue(timeout=-1)


def test_a_reader_that_never_joins_is_named() -> None:
    writer = MessageQueue(2, 2, [5, 7], max_chunks=1, settings=SETTINGS)
    reader = MessageQueue.create_from_handle(writer.export_handle(), 5, settings=SETTINGS)
    with pytest.raises(CommTimeoutError, match="for reader rank 7 to join"):
        writer.wait_until_ready(timeout=0.05)
    with pytest.raises(CommTimeoutError, match=r"rank 5 waited 0\.05 s for the writer"):
        reader.wait_until_ready(timeout=0.05)
    writer.enqueue(1)
    with pytest.raises(
        CommTimeoutError, match=r"rank 5 \(process \d+\), rank 7, which has not joined"
    ):
        writer.enqueue(2, timeout=0.05)


def test_chunks_of_bytes() -> None:
    writer, readers_ = both_ends(2, max_chunk_bytes=1000)
    with writer.acquire_write() as chunk:
        assert len(chunk) == 1000
        chunk[:5] = b"hello"
    with pytest.raises(RuntimeError, match="changed my mind"), writer.acquire_write() as chunk:
        chunk[:5] = b"never"
        raise RuntimeError("changed my mind")
    writer.enqueue("an object")
    for reader in readers_:
        with pytest.raises(InvalidArgumentError, match="acquire_read"):
            reader.dequeue()
        with reader.acquire_read() as chunk:
            assert bytes(chunk[:5]) == b"hello" and len(chunk) == 1000
        with pytest.raises(InvalidArgumentError, match="dequeue"), reader.acquire_read():
            pass
        assert reader.dequeue() == "an object"


def test_broadcast_object() -> None:
    writer, (reader,) = both_ends()
    assert writer.broadcast_object([1]) == [1]
    assert reader.broadcast_object() == [1]


def test_the_ring_buffers_flags_are_the_state_table() -> None:
    writer, (first, second) = both_ends(2, max_chunks=2)
    ring = pickle.loads(pickle.dumps(writer._writer.ring))
    assert isinstance(ring, ShmRingBuffer) and not ring.is_creator

    def flags(slot: int) -> list[int]:
        with ring.get_metadata(slot) as metadata:
            return list(metadata)

    assert flags(0) == flags(1) == [0, 0, 0]  # FREE
    with writer.acquire_write() as chunk:
        chunk[:3] = b"abc"
    assert (flags(0), flags(1)) == ([1, 0, 0], [0, 0, 0])  # WRITTEN
    with ring.get_data(0) as data:
        assert bytes(data[:3]) == b"abc"
    with second.acquire_read():
        assert flags(0) == [1, 0, 0]
    assert flags(0) == [1, 0, 1]  # PART_READ
    with first.acquire_read():
        pass
    assert flags(0) == [1, 1, 1]  # READ
    ring.close()
