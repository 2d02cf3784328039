"""Readers over TCP, on the loopback interface: order, late readers, wrong keys, garbage."""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

zmq = pytest.importorskip("zmq", reason="remote readers need pyzmq")

from communicators import Group  # noqa: E402
from communicators.errors import (  # noqa: E402
    CommTimeoutError,
    InvalidArgumentError,
    PeerDiedError,
    QueueClosedError,
    RefusedError,
)
from communicators.message_queue import for_group  # noqa: E402
from communicators.shm_broadcast import Handle, MessageQueue  # noqa: E402
from tests.threads import run_ranks  # noqa: E402
from tests.unit.queue_processes import SETTINGS, eventually, readers  # noqa: E402


@contextlib.contextmanager
def remote_queue(
    n_remote: int = 1, n_local: int = 0, **options: Any
) -> Iterator[tuple[MessageQueue, Handle]]:
    queue = MessageQueue(n_remote + n_local, n_local, settings=SETTINGS, **options)
    try:
        yield queue, queue.export_handle()
    finally:
        queue.close()


def join(handle: Handle, rank: int) -> MessageQueue:
    return MessageQueue.create_from_handle(handle, rank, settings=SETTINGS)


def test_objects_arrive_locally_and_remotely() -> None:
    with remote_queue(n_remote=2, n_local=1) as (queue, handle):
        ends = [join(handle, rank) for rank in (0, 7, 8)]
        sent: list[Any] = [
            {"a": 1},
            np.arange(100_000),
            {"t": torch.randn(300, 100).to(torch.bfloat16), "s": "x" * 100_000},
            None,
        ]
        for obj in sent:
            queue.enqueue(obj)
        for end in ends:
            assert end.dequeue() == sent[0]
            array: Any = end.dequeue()
            array += 1  # one's own
            assert (array == sent[1] + 1).all()
            third: Any = end.dequeue(copy=False)
            assert torch.equal(third["t"], sent[2]["t"]) and third["s"] == sent[2]["s"]
            assert end.dequeue() is None
        for end in ends:
            end.close()


def test_it_binds_to_loopback_unless_told_otherwise() -> None:
    with remote_queue() as (_, handle):
        assert handle.remote_address.startswith("tcp://127.0.0.1:")
        assert handle.remote_key.hex() not in repr(handle) and "remote_key" not in repr(handle)
    with pytest.raises(InvalidArgumentError, match="cannot be bound"):
        MessageQueue(1, 0, connect_ip="192.0.2.1", settings=SETTINGS)


def _collect(queue: MessageQueue, count: int) -> list[int]:
    queue.wait_until_ready()
    return [int(np.asarray(queue.dequeue()).flat[0]) for _ in range(count)]


def test_order_under_back_pressure() -> None:
    with (
        remote_queue(n_remote=2, n_local=1, max_chunks=3) as (queue, _),
        readers(queue, [0, 1, 2], _collect, 400, method="spawn") as made,
    ):
        queue.wait_until_ready()
        for number in range(400):
            queue.enqueue(number if number % 7 else np.full(10_000, number))
        for reader in made:
            assert reader.result() == list(range(400))


def test_a_late_reader_gets_everything_and_holds_the_writer_back() -> None:
    with remote_queue(max_chunks=3) as (queue, handle):
        for number in range(3):
            queue.enqueue(number)
        with pytest.raises(CommTimeoutError, match="1 that has not joined"):
            queue.enqueue(3, timeout=0.1)
        reader = join(handle, 0)
        assert [reader.dequeue(timeout=10) for _ in range(3)] == [0, 1, 2]
        queue.enqueue(3, timeout=10)
        assert reader.dequeue(timeout=10) == 3
        reader.close()


def test_a_slow_reader_is_named_and_the_message_is_sent_to_nobody() -> None:
    with remote_queue(n_remote=1, n_local=1, max_chunks=2) as (queue, handle):
        near, far = join(handle, 0), join(handle, 5)
        for number in range(2):
            queue.enqueue(number)
            assert near.dequeue() == number
        assert eventually(lambda: bool(queue._remote_writer._peers))
        with pytest.raises(CommTimeoutError, match="rank 5"):
            queue.enqueue(2, timeout=0.2)
        with pytest.raises(CommTimeoutError):
            near.dequeue(timeout=0.1)
        assert [far.dequeue(), far.dequeue()] == [0, 1]
        queue.enqueue(3, timeout=10)
        assert near.dequeue() == far.dequeue() == 3
        far.close()


def test_chunks_of_bytes() -> None:
    with remote_queue(max_chunk_bytes=100) as (queue, handle):
        reader = join(handle, 0)
        with queue.acquire_write() as chunk:
            chunk[:5] = b"hello"
        with pytest.raises(InvalidArgumentError, match="acquire_read"):
            reader.dequeue()
        with reader.acquire_read() as chunk:
            assert bytes(chunk[:5]) == b"hello" and len(chunk) == 100
        reader.close()


def test_close_reaches_the_other_side() -> None:
    with remote_queue(n_remote=2) as (queue, handle):
        first, second = join(handle, 0), join(handle, 1)
        queue.enqueue(1)
        assert first.dequeue() == 1
        first.close()
        for number in range(2, 30):  # goes on without it
            queue.enqueue(number, timeout=10)
            assert second.dequeue(timeout=10) == number - 1
        queue.close()
        assert second.dequeue() == 29
        with pytest.raises(QueueClosedError, match="the writer has closed it"):
            second.dequeue()
        second.close()


def _hang(queue: MessageQueue) -> None:
    queue.wait_until_ready()
    time.sleep(1000)


def test_a_killed_reader_is_dropped() -> None:
    with remote_queue(n_remote=2, max_chunks=2) as (queue, handle):
        other = join(handle, 1)
        with readers(queue, [0], _hang, method="spawn") as (victim,):
            assert victim.answer()[0] == "joined"
            queue.enqueue(0)
            assert other.dequeue() == 0
            assert eventually(lambda: len(queue._remote_writer._peers) == 2)
            victim.kill()
            for number in range(1, 20):
                queue.enqueue(number, timeout=10)
                assert other.dequeue(timeout=10) == number
        other.close()


def _write_three_and_die(pipe: Any) -> None:
    queue = MessageQueue(1, 0, settings=SETTINGS)
    pipe.send(queue.export_handle())
    for number in range(3):
        queue.enqueue(number)
    queue.wait_until_ready()
    time.sleep(1000)


def test_a_killed_writer_ends_the_reader_after_what_it_sent() -> None:
    import multiprocessing

    context: Any = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    writer = context.Process(target=_write_three_and_die, args=(theirs,), daemon=True)
    writer.start()
    assert ours.poll(60)
    reader = join(ours.recv(), 0)
    reader.wait_until_ready()  # that signal comes behind the messages: all three have arrived
    assert reader.dequeue(timeout=20) == 0
    writer.kill()
    assert [reader.dequeue(timeout=20), reader.dequeue(timeout=20)] == [1, 2]
    began = time.monotonic()
    with pytest.raises(PeerDiedError, match="the writer is gone"):
        reader.dequeue(timeout=20)
    assert time.monotonic() - began < 5
    reader.close()


def test_a_wrong_key_is_refused_counted_and_the_queue_goes_on() -> None:
    with remote_queue() as (queue, handle):
        other_public, _ = zmq.curve_keypair()
        thief = join(replace(handle, remote_key=other_public + handle.remote_key[40:]), 0)
        with pytest.raises(RefusedError, match="the key of the handle is not that of the queue"):
            thief.dequeue(timeout=20)
        thief.close()
        assert eventually(lambda: queue.rejected >= 1)
        guesser = join(replace(handle, remote_key=handle.remote_key[:40] + bytes(32)), 0)
        with pytest.raises(CommTimeoutError, match="has not answered"):
            guesser.dequeue(timeout=0.5)
        assert eventually(lambda: queue.rejected >= 2)
        guesser.close()
        reader = join(handle, 0)
        queue.enqueue("for readers only")
        assert reader.dequeue(timeout=20) == "for readers only"
        reader.close()


class _Bomb:
    def __reduce__(self) -> Any:
        return pytest.fail, ("garbage was unpickled",)


def test_garbage_at_the_port_is_counted_and_never_unpickled() -> None:
    import pickle

    with remote_queue() as (queue, handle):
        host, port = handle.remote_address.removeprefix("tcp://").split(":")
        bomb = pickle.dumps(_Bomb())
        for garbage in (b"GET / HTTP/1.0\r\n\r\n", bytes(100), bomb, b"\xff" + bytes(8) + b"\x7f"):
            with socket.create_connection((host, int(port)), timeout=5) as stranger:
                stranger.sendall(garbage + struct.pack("!Q", 1 << 40) * 20)
                stranger.settimeout(0.2)
                with contextlib.suppress(OSError):
                    stranger.recv(1000)
        reader = join(handle, 0)
        queue.enqueue(0)
        assert reader.dequeue(timeout=20) == 0
        # A member who sends what readers do not send.
        before = queue.rejected
        frames = (bomb, b"A", b"A" + bytes(7) + b"\xff", b"", b"H" * 41, b"Z" * 300)
        for frame in frames:
            reader._remote_reader._socket.send(frame)
        assert eventually(lambda: queue.rejected == before + len(frames))
        queue.enqueue("on", timeout=20)
        assert reader.dequeue(timeout=20) == "on"
        # A frame that is longer than any reader's ends the connection.
        reader._remote_reader._socket.send(bytes(10_000))
        with pytest.raises(PeerDiedError, match="has ended"):
            reader.dequeue(timeout=20)
        reader.close()


def test_a_rank_joins_once() -> None:
    with remote_queue(n_remote=2) as (_, handle):
        first = join(handle, 3)
        again = join(handle, 3)
        with pytest.raises((InvalidArgumentError, CommTimeoutError), match="rank 3"):
            for end in (again, first):
                end.wait_until_ready(timeout=1)
        first.close()
        again.close()


@pytest.mark.parametrize("writer_rank", [0, 2])
@pytest.mark.parametrize("hosts", ["aaa", "aba", "abc", "aab"])
def test_a_group_that_spans_hosts(
    hosts: str, writer_rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads stand for ranks; who is on which host is pretended."""
    monkeypatch.setattr(for_group, "pid_space", _pretended_host)

    def body(group: Any) -> Any:
        _here.host = hosts[group.rank]
        queue = MessageQueue.create_from_process_group(
            group, writer_rank=writer_rank, connect_ip="127.0.0.1", timeout=20
        )
        handle = queue.export_handle()
        got = [queue.broadcast_object((i, "x") if group.rank == writer_rank else None, 20)
               for i in range(20)]  # fmt: skip
        group.barrier(20)
        queue.close()
        return got, handle.local_reader_ranks

    for got, local in run_ranks(3, body, timeout_s=30):
        assert got == [(i, "x") for i in range(20)]
        same = {r for r in range(3) if r != writer_rank and hosts[r] == hosts[writer_rank]}
        assert set(local) == same


def test_the_address_that_remote_readers_get_is_the_one_towards_the_store() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    group = Group(store, 0, 1, settings=SETTINGS)
    assert for_group.address_towards_store(group) == "127.0.0.1"
    nowhere = Group(dist.HashStore(), 0, 1, settings=SETTINGS)
    with pytest.raises(InvalidArgumentError, match="pass connect_ip"):
        for_group.address_towards_store(nowhere)


def test_a_group_in_which_one_rank_cannot_join_refuses_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def body(group: Any) -> Any:
        if group.rank == 2:
            monkeypatch.setattr(
                MessageQueue, "create_from_handle", staticmethod(_cannot), raising=True
            )
        group.barrier(20)
        return MessageQueue.create_from_process_group(group, timeout=20)

    for outcome in run_ranks(3, body, timeout_s=30):
        assert isinstance(outcome, RefusedError) and "no memory today" in str(outcome)


def _cannot(*_: Any, **__: Any) -> None:
    raise RefusedError("no memory today")


_here = threading.local()


def _pretended_host() -> str:
    return _here.host
