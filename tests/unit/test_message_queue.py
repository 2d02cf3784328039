"""MessageQueue inside a host: objects, order, waits, errors, the ends of its life."""

import gc
import math
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from communicators.errors import (
    CommTimeoutError,
    CommunicatorError,
    InvalidArgumentError,
    PeerDiedError,
    QueueClosedError,
    RefusedError,
)
from communicators.message_queue import ends
from communicators.message_queue.native_ring import api
from communicators.shm_broadcast import MessageQueue, ShmRingBuffer
from tests.unit.queue_processes import DEADLINE_S, SETTINGS, both_ends, local_queue, readers

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


def test_what_cannot_be_pickled_is_refused_and_the_queue_goes_on() -> None:
    writer, (reader,) = both_ends()
    with pytest.raises(InvalidArgumentError, match="cannot be pickled"):
        writer.enqueue({"f": lambda: None, "big": np.zeros(10_000)})
    writer.enqueue(_Refuses())
    writer.enqueue("next")
    with pytest.raises(CommunicatorError, match=r"cannot be unpickled.*not here"):
        reader.dequeue()
    assert reader.dequeue() == "next"


class _Refuses:
    def __reduce__(self) -> tuple[object, ...]:
        return _raise, ()


def _raise() -> None:
    raise RuntimeError("not here")


def test_handles_that_cannot_be_joined() -> None:
    queue = MessageQueue(1, 1, [3], settings=SETTINGS)
    handle = queue.export_handle()
    with pytest.raises(RefusedError, match="version 99"):
        MessageQueue.create_from_handle(replace(handle, version=99), 3)
    with pytest.raises(InvalidArgumentError, match="local readers only, of ranks 3"):
        MessageQueue.create_from_handle(handle, 4)
    with pytest.raises(InvalidArgumentError, match="what export_handle"):
        MessageQueue.create_from_handle("handle", 3)  # type: ignore[arg-type]
    with pytest.raises(RefusedError, match="another host"):
        MessageQueue.create_from_handle(replace(handle, pid_space="elsewhere"), 3)
    reader = MessageQueue.create_from_handle(handle, 3)
    with pytest.raises(InvalidArgumentError, match=f"as process {os.getpid()}"):
        MessageQueue.create_from_handle(handle, 3)
    queue.enqueue("still fine")
    assert reader.dequeue() == "still fine"
    queue.close()
    with pytest.raises(PeerDiedError, match="is gone or has closed it"):
        MessageQueue.create_from_handle(handle, 3)


def _make_and_exit(pipe: object) -> None:
    pipe.send(local_queue(1).export_handle())  # type: ignore[attr-defined]


def test_a_handle_of_a_job_that_is_gone() -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_make_and_exit, args=(theirs,))
    process.start()
    handle = ours.recv()
    process.join()
    with pytest.raises(PeerDiedError, match=f"process {process.pid}.* is gone"):
        MessageQueue.create_from_handle(handle, 0)


def test_wrong_arguments() -> None:
    for arguments in ((0, 0), (1, 2), (2, -1)):
        with pytest.raises(InvalidArgumentError, match="at least one reader"):
            MessageQueue(*arguments)
    with pytest.raises(InvalidArgumentError, match="2 different ranks"):
        MessageQueue(2, 2, [1, 1])
    with pytest.raises(InvalidArgumentError, match="1 to 64 readers"):
        MessageQueue(65, 65)
    with pytest.raises(InvalidArgumentError, match="positive sizes"):
        MessageQueue(1, 1, max_chunks=0)
    writer, (reader,) = both_ends()
    with pytest.raises(InvalidArgumentError, match="a reader's end"):
        reader.enqueue(1)
    with pytest.raises(InvalidArgumentError, match="the writer's end"):
        writer.dequeue()


def test_a_closed_writer_lets_readers_finish() -> None:
    writer, (reader,) = both_ends()
    writer.enqueue(1)
    writer.close()
    writer.close()
    assert reader.dequeue() == 1
    for _ in range(2):
        with pytest.raises(QueueClosedError, match="the writer has closed it"):
            reader.dequeue()
    with pytest.raises(QueueClosedError, match="this end was closed"):
        writer.enqueue(2)


def test_a_reader_that_leaves_is_waited_for_no_more() -> None:
    writer, (first, second) = both_ends(2, max_chunks=2)
    for i in range(2):
        writer.enqueue(i)
        assert first.dequeue() == i
    second.close()
    writer.enqueue(2, timeout=5)
    assert first.dequeue() == 2
    first.close()
    with pytest.raises(QueueClosedError, match="every reader has closed it"):
        for i in range(3):
            writer.enqueue(i, timeout=5)
    with pytest.raises(QueueClosedError, match="this end was closed"):
        first.dequeue()


@pytest.mark.parametrize("which", ["writer", "reader", "other side"])
def test_close_wakes_a_thread_that_waits(which: str) -> None:
    writer, (reader,) = both_ends(max_chunks=1)
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            if which == "writer":
                writer.enqueue(1)
                writer.enqueue(2)
            else:
                reader.dequeue()
        except QueueClosedError as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    began = time.monotonic()
    (reader if which == "reader" else writer).close()
    thread.join(10)
    assert caught and time.monotonic() - began < 1


def test_threads_share_an_end() -> None:
    writer, (reader,) = both_ends()
    got: list[int] = []

    def write(begin: int) -> None:
        for i in range(begin, begin + 300):
            writer.enqueue(i)

    def read() -> None:
        for _ in range(300):
            got.append(reader.dequeue())

    threads = [threading.Thread(target=write, args=(1000 * i,)) for i in range(4)]
    threads += [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert sorted(got) == sorted(1000 * i + k for i in range(4) for k in range(300))


def test_a_thread_that_waits_for_its_turn_has_a_deadline() -> None:
    writer, (reader,) = both_ends()
    thread = threading.Thread(target=reader.dequeue)
    thread.start()
    time.sleep(0.05)
    with pytest.raises(CommTimeoutError, match="another thread"):
        reader.dequeue(timeout=0.05)
    writer.enqueue(None)
    thread.join(10)


def test_a_forked_child_cannot_use_the_parents_end() -> None:
    writer, (reader,) = both_ends()

    def child(pipe: object) -> None:
        errors = []
        for call in (lambda: writer.enqueue(1), reader.dequeue, writer.wait_until_ready):
            try:
                call()
            except RefusedError as error:
                errors.append(str(error))
        writer.close()
        pipe.send(errors)  # type: ignore[attr-defined]

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs,))
    process.start()
    assert ours.poll(DEADLINE_S)
    errors = ours.recv()
    assert len(errors) == 3 and all("this is its child" in error for error in errors)
    process.join()
    writer.enqueue("the parent's still works")
    assert reader.dequeue() == "the parent's still works"


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


def test_it_works_without_pyzmq() -> None:
    program = (
        "import sys; sys.modules['zmq'] = None\n"
        "from communicators.shm_broadcast import MessageQueue\n"
        "q = MessageQueue(1, 1); r = MessageQueue.create_from_handle(q.export_handle(), 0)\n"
        "q.enqueue('fine'); print(r.dequeue())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "fine\n", done.stderr


def test_it_gives_everything_back() -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    def mapped() -> int:
        with open("/proc/self/maps") as maps:
            return sum("memfd:message-queue" in line for line in maps)

    gc.collect()
    before = open_files(), mapped(), os.listdir("/dev/shm")
    for explicit in (True, False):
        writer, (reader,) = both_ends()
        writer.enqueue(np.zeros(100_000))
        reader.dequeue()
        if explicit:
            reader.close()
            writer.close()
        del writer, reader
        gc.collect()
        assert (open_files(), mapped(), os.listdir("/dev/shm")) == before
