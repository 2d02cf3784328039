"""MessageQueue when processes are killed: nobody hangs, nothing is lost, nothing stays behind."""

import multiprocessing
import os
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from communicators.errors import CommTimeoutError, PeerDiedError, QueueClosedError
from communicators.message_queue import ends
from communicators.message_queue.deadline import Deadline
from communicators.message_queue.native_ring import api
from communicators.shm_broadcast import MessageQueue
from tests.unit.queue_processes import (
    SETTINGS,
    Reader,
    eventually,
    local_queue,
    readers,
    traces,
)

#: A death is noticed within LOOK_S; the rest is for a busy machine.
SOON_S = 2.0


def _hang(queue: MessageQueue) -> None:
    queue.wait_until_ready()
    time.sleep(1000)


def _collect_until_the_end(queue: MessageQueue) -> tuple[list[int], str]:
    """The numbers of all messages, and what ended them."""
    got = []
    try:
        while True:
            message = queue.dequeue(copy=bool(len(got) & 1))
            number = int(message[0])
            assert message.size == size_of(number) and (message == number).all()
            got.append(number)
            del message
    except (PeerDiedError, QueueClosedError) as error:
        return got, type(error).__name__


def size_of(number: int) -> int:
    return 1 + (number * 7919) % 20_000


def message_of(number: int) -> np.ndarray:
    return np.full(size_of(number), number, np.int32)


def test_a_killed_reader_is_dropped_while_the_writer_waits_for_it() -> None:
    queue = local_queue(2, max_chunks=2)
    with (
        readers(queue, [0], _hang) as (hanging,),
        readers(queue, [1], _collect_until_the_end) as (other,),
    ):
        queue.wait_until_ready()
        for number in range(2):
            queue.enqueue(message_of(number))
        with pytest.raises(CommTimeoutError, match=f"rank 0 \\(process {hanging.process.pid}\\)"):
            queue.enqueue(message_of(2), timeout=0.2)
        hanging.kill()
        began = time.monotonic()
        for number in range(2, 12):
            queue.enqueue(message_of(number), timeout=20)
        assert time.monotonic() - began < SOON_S
        queue.close()
        assert other.result() == (list(range(12)), "QueueClosedError")


def test_a_writer_without_readers_is_told() -> None:
    queue = local_queue(1, max_chunks=2)
    with readers(queue, [0], _hang) as (reader,):
        queue.wait_until_ready()
        reader.kill()
        began = time.monotonic()
        with pytest.raises(PeerDiedError, match="no reader is left; the process of rank 0 is gone"):
            for number in range(10):
                queue.enqueue(number)
        assert time.monotonic() - began < SOON_S


def _hold_views(queue: MessageQueue, pipe: Any) -> None:
    queue.wait_until_ready()
    held = [queue.dequeue(copy=False) for _ in range(8)]
    queue.close()  # holds them all the same
    pipe.send(len(held))
    time.sleep(1000)


def test_views_held_by_a_killed_reader_are_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ends, "UNREAD_LIMIT_BYTES", 1 << 20)
    queue, (ours, theirs) = local_queue(2), multiprocessing.Pipe()
    near = MessageQueue.create_from_handle(queue.export_handle(), 1, settings=SETTINGS)
    message = np.zeros(500_000, np.uint8)

    def send_and_read(count: int) -> int:
        for _ in range(count):
            queue.enqueue(message)
            assert near.dequeue().size == message.size
        return int(api().backed_bytes(queue._writer.handle))

    with readers(queue, [0], _hold_views, theirs) as (holder,):
        queue._writer.wait_until_ready(Deadline(30, SETTINGS))
        queue._writer.set_ready()
        send_and_read(8)
        assert ours.poll(30) and ours.recv() == 8
        assert send_and_read(3) > 8 * message.size, "what is held was written over"
        holder.kill()
        send_and_read(2)
        assert send_and_read(2) < 4 * message.size, "memory of a dead reader was kept"


def _be_the_writer(pipe: Any, n_reader: int, go_on: Callable[[int], bool]) -> None:
    queue = local_queue(n_reader)
    pipe.send(queue.export_handle())
    queue.wait_until_ready()
    number = 0
    while go_on(number):
        queue.enqueue(message_of(number))
        number += 1
    time.sleep(1000)


def _up_to_five(number: int) -> bool:
    return number < 5


def _without_end(number: int) -> bool:
    return True


def _start_writer(n_reader: int, go_on: Callable[[int], bool]) -> tuple[Any, Any]:
    context: Any = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_be_the_writer, args=(theirs, n_reader, go_on), daemon=True)
    process.start()
    assert ours.poll(30)
    return process, ours.recv()


def test_a_killed_writer_ends_all_readers_at_once_after_what_it_wrote() -> None:
    before = traces()
    writer, handle = _start_writer(3, _up_to_five)
    made = [Reader(handle, rank, _collect_and_wait) for rank in range(3)]
    for reader in made:
        assert reader.answer()[0] == "joined"
    time.sleep(0.5)  # all sleep in the futex
    killed = time.monotonic()
    writer.kill()
    for reader in made:
        kind, value = reader.answer()
        assert kind == "done", value
        numbers, error, text, when = value
        assert numbers == list(range(5))
        assert error == "PeerDiedError" and f"the writer (process {writer.pid}) is gone" in text
        assert when - killed < SOON_S
    for reader in made:
        reader.process.join(10)
    assert traces() == before


def _collect_and_wait(queue: MessageQueue) -> tuple[list[int], str, str, float]:
    queue.wait_until_ready()
    got = []
    try:
        while True:
            got.append(int(queue.dequeue()[0]))
    except PeerDiedError as error:
        return got, type(error).__name__, str(error), time.monotonic()


def test_readers_that_wait_to_be_ready_are_told_of_the_writers_death() -> None:
    writer, handle = _start_writer(2, _up_to_five)
    reader = Reader(handle, 0, MessageQueue.wait_until_ready)
    assert reader.answer()[0] == "joined"
    time.sleep(0.2)
    writer.kill()
    kind, text = reader.answer()
    assert kind == "PeerDiedError" and "died before the queue was ready" in text


@pytest.mark.parametrize("seed", range(6))
def test_a_writer_killed_at_any_moment_tears_nothing(seed: int) -> None:
    before = traces()
    writer, handle = _start_writer(2, _without_end)
    made = [Reader(handle, rank, _collect_until_the_end) for rank in range(2)]
    time.sleep(random.Random(seed).uniform(0.05, 0.4))
    writer.kill()
    answers = [reader.result() for reader in made]
    for numbers, error in answers:
        assert error == "PeerDiedError"
        assert numbers == list(range(len(numbers)))
    assert answers[0] == answers[1], "a message reached one reader and not the other"
    for reader in made:
        reader.process.join(10)
    assert traces() == before


@pytest.mark.parametrize("seed", range(6))
def test_readers_killed_at_any_moment_take_nothing_from_the_others(seed: int) -> None:
    rng = random.Random(seed)
    queue = local_queue(4, max_chunks=3)
    with readers(queue, [0, 1, 2, 3], _collect_until_the_end) as made:
        victims = rng.sample(range(4), 2)
        moments = sorted(rng.sample(range(300), 2))
        for number in range(300):
            if moments and number == moments[0]:
                moments.pop(0)
                os.kill(made[victims.pop()].process.pid, 9)
            queue.enqueue(message_of(number), timeout=20)
        queue.close()
        survivors = [reader for reader in made if reader.process.exitcode is None]
        assert eventually(lambda: len([r for r in made if r.process.exitcode == -9]) == 2)
        survivors = [reader for reader in made if reader.process.exitcode != -9]
        for reader in survivors:
            assert reader.result() == (list(range(300)), "QueueClosedError")


def test_settings_bound_a_wait_without_timeout() -> None:
    from dataclasses import replace

    queue = MessageQueue(1, 1, settings=replace(SETTINGS, timeout_s=0.1))
    with pytest.raises(CommTimeoutError, match=r"waited 0\.1 s"):
        queue.wait_until_ready()
