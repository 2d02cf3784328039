"""MessageQueue inside a host: what is refused, how it ends, threads, forks, what stays behind."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from communicators.errors import (
    CommTimeoutError,
    CommunicatorError,
    InvalidArgumentError,
    PeerDiedError,
    QueueClosedError,
    RefusedError,
)
from communicators.shm_broadcast import MessageQueue
from tests.unit.queue_processes import (
    DEADLINE_S,
    SETTINGS,
    both_ends,
    either_end,
    local_queue,
    traces,
)

__all__ = ["either_end"]  # pytest finds fixtures by their names here
pytestmark = pytest.mark.usefixtures("either_end")


def test_what_cannot_be_pickled_is_refused_and_the_queue_goes_on() -> None:
    writer, (reader,) = both_ends()
    with pytest.raises(InvalidArgumentError, match="cannot be pickled"):
        writer.enqueue({"f": lambda: None, "big": np.zeros(10_000)})
    writer.enqueue(_Refuses())
    writer.enqueue("next")
    with pytest.raises(CommunicatorError, match=r"cannot be unpickled.*not here"):
        reader.dequeue()
    assert reader.dequeue() == "next"


class _Interrupts:
    def __reduce__(self) -> tuple[object, ...]:
        raise KeyboardInterrupt


def test_an_interrupted_enqueue_leaves_nothing_for_the_next() -> None:
    writer, (reader,) = both_ends()
    shared = ["shared"]
    with pytest.raises(KeyboardInterrupt):
        writer.enqueue([shared, b"x" * 100_000, np.zeros(10_000), _Interrupts()])
    writer.enqueue([shared, shared])
    assert reader.dequeue() == [["shared"], ["shared"]]
    with pytest.raises(CommTimeoutError):
        reader.dequeue(timeout=0)


def test_a_signal_interrupts_a_wait() -> None:
    writer, (reader,) = both_ends()

    def handler(*_: object) -> None:
        raise TimeoutError("from the handler")

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        began = time.monotonic()
        with pytest.raises(TimeoutError, match="from the handler"):
            reader.dequeue(timeout=30)
        assert time.monotonic() - began < 5
    finally:
        signal.signal(signal.SIGALRM, before)
    writer.enqueue("the queue goes on")
    assert reader.dequeue() == "the queue goes on"


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
        MessageQueue.create_from_handle("handle", 3)
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
    before = open_files(), mapped(), traces()
    for explicit in (True, False):
        writer, (reader,) = both_ends()
        writer.enqueue(np.zeros(100_000))
        reader.dequeue()
        if explicit:
            reader.close()
            writer.close()
        del writer, reader
        gc.collect()
        assert (open_files(), mapped(), traces()) == before
