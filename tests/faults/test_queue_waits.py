"""Every wait of MessageQueue hears Ctrl-C, ends when the other side dies, and costs nothing."""

import contextlib
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from communicators.errors import CommunicatorError, PeerDiedError, RefusedError
from communicators.message_queue import handle, process
from communicators.message_queue.deadline import LOOK_S
from communicators.shm_broadcast import MessageQueue
from tests.unit.queue_processes import SETTINGS, both_ends

ROOT = Path(__file__).resolve().parents[2]
SOON_S = 2.0


def far_ends() -> tuple[MessageQueue, MessageQueue]:
    pytest.importorskip("zmq", reason="remote readers need pyzmq")
    writer = MessageQueue(1, 0, max_chunks=1, settings=SETTINGS)
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0, settings=SETTINGS)
    return writer, reader


# --- Ctrl-C ---------------------------------------------------------------------------------------


def _near(call: Callable[[MessageQueue, MessageQueue], Any]) -> Callable[[], Any]:
    def wait() -> None:
        writer, (reader,) = both_ends(max_chunks=2)
        with writer, reader:
            call(writer, reader)

    return wait


def _far(call: Callable[[MessageQueue, MessageQueue], Any]) -> Callable[[], Any]:
    def wait() -> None:
        writer, reader = far_ends()
        with reader, writer:
            call(writer, reader)

    return wait


def _fill(writer: MessageQueue, message: Any) -> None:
    for _ in range(3):
        writer.enqueue(message)


def _write_chunks(writer: MessageQueue, _: MessageQueue) -> None:
    for _number in range(3):
        with writer.acquire_write():
            pass


def _read_chunk(_: MessageQueue, reader: MessageQueue) -> None:
    with reader.acquire_read():
        pass


def _behind_another_thread(_: MessageQueue, reader: MessageQueue) -> None:
    threading.Thread(target=_until_closed, args=(reader,), daemon=True).start()
    time.sleep(0.1)
    reader.dequeue()


def _until_closed(reader: MessageQueue) -> None:
    with contextlib.suppress(CommunicatorError):
        reader.dequeue()


def _alone(n_local: int) -> Callable[[], Any]:
    def wait() -> None:
        with MessageQueue(1, n_local, settings=SETTINGS) as writer:
            writer.wait_until_ready()

    return wait


WAITS: dict[str, Callable[[], Any]] = {
    "dequeue": _near(lambda w, r: r.dequeue()),
    "dequeue a view": _near(lambda w, r: r.dequeue(copy=False)),
    "enqueue, plain": _near(lambda w, r: _fill(w, 1)),
    "enqueue, pickled": _near(lambda w, r: _fill(w, {1})),
    "enqueue, block": _near(lambda w, r: _fill(w, np.zeros(40 << 20, np.uint8))),
    "acquire_read": _near(_read_chunk),
    "acquire_write": _near(_write_chunks),
    "wait_until_ready, reader": _near(lambda w, r: r.wait_until_ready()),
    "wait_until_ready, writer": _alone(1),
    "another thread": _near(_behind_another_thread),
    "far: dequeue": _far(lambda w, r: r.dequeue()),
    "far: enqueue": _far(lambda w, r: _fill(w, 1)),
    "far: acquire_read": _far(_read_chunk),
    "far: acquire_write": _far(_write_chunks),
    "far: wait_until_ready, reader": _far(lambda w, r: r.wait_until_ready()),
    "far: wait_until_ready, writer": _alone(0),
}


@contextlib.contextmanager
def signalled(by_a_thread: bool) -> Iterator[list[float]]:
    """SIGINT in 0.15 s; `by_a_thread`: one that a thread of ours takes, and no system call of the
    main one ends with."""
    if by_a_thread:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    sent: list[float] = []

    def send() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        time.sleep(0.15)
        sent.append(time.monotonic())
        if by_a_thread:
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        else:
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield sent
    finally:
        thread.join()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


@pytest.mark.parametrize("by_a_thread", [False, True], ids=["main", "thread"])
@pytest.mark.parametrize("where", WAITS)
def test_ctrl_c_ends_every_wait(where: str, by_a_thread: bool) -> None:
    with signalled(by_a_thread) as sent, pytest.raises(KeyboardInterrupt):
        WAITS[where]()
    assert time.monotonic() - sent[0] < SOON_S


# --- the other side is gone -----------------------------------------------------------------------


def test_a_far_reader_that_comes_after_the_writers_death_is_told() -> None:
    pytest.importorskip("zmq", reason="remote readers need pyzmq")
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    writer = context.Process(target=_give_handle_and_sleep, args=(theirs,), daemon=True)
    writer.start()
    made = ours.recv()
    writer.kill()
    writer.join()
    began = time.monotonic()
    with MessageQueue.create_from_handle(made, 0, settings=SETTINGS) as reader:
        for call in (reader.wait_until_ready, reader.dequeue):
            with pytest.raises(PeerDiedError, match=r"nothing listens at tcp://.*rank 0"):
                call(timeout=20)
    assert time.monotonic() - began < 2 * SOON_S


def _give_handle_and_sleep(pipe: Any) -> None:
    queue = MessageQueue(1, 0, settings=SETTINGS)
    pipe.send(queue.export_handle())
    time.sleep(1000)


# --- pid namespaces of their own ------------------------------------------------------------------

#: Joins as a reader of this host, which it is not; then over TCP.
READER = """
import pickle, sys, time
from communicators.errors import CommunicatorError
from communicators.shm_broadcast import MessageQueue
handle = pickle.loads(bytes.fromhex(sys.argv[1]))
began = time.monotonic()
try:
    MessageQueue.create_from_handle(handle, 0)
except CommunicatorError as error:
    print(type(error).__name__, time.monotonic() - began < 2, error, sep="|")
queue = MessageQueue.create_from_handle(handle, 1)
queue.wait_until_ready(60)
print(queue.dequeue(timeout=60))
time.sleep(1000)
"""

WRITER = """
import pickle, time
from communicators.errors import CommunicatorError
from communicators.shm_broadcast import MessageQueue
queue = MessageQueue(2, 1)
print(pickle.dumps(queue.export_handle()).hex())
try:
    MessageQueue.create_from_handle(queue.export_handle(), 0)
    print("joined")
except CommunicatorError as error:
    print(type(error).__name__, error, sep="|")
queue._remote_writer.wait_until_ready(__import__("communicators.message_queue.deadline",
    fromlist=["Deadline"]).Deadline(60, queue._settings))
queue.enqueue("from another namespace")
time.sleep(1000)
"""


def _in_namespace(program: str, *arguments: str, proc: bool) -> subprocess.Popen[str]:
    if shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("making a pid namespace needs root and unshare")
    how = ["unshare", "--pid", "--fork", "--kill-child", *(["--mount-proc"] if proc else [])]
    if subprocess.run([*how, "true"], capture_output=True, check=False, timeout=20).returncode:
        pytest.skip("no pid namespace can be made here")
    return subprocess.Popen(
        [*how, sys.executable, "-u", "-c", program, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def _line(running: subprocess.Popen[str]) -> str:
    assert running.stdout is not None
    return running.stdout.readline().strip()


def test_a_reader_in_another_pid_namespace_is_refused_and_joins_over_tcp() -> None:
    pytest.importorskip("zmq", reason="remote readers need pyzmq")
    with MessageQueue(2, 1, max_chunks=2, settings=SETTINGS) as writer:
        joined = writer.export_handle()
        reader = _in_namespace(READER, pickle.dumps(joined).hex(), proc=True)
        try:
            kind, soon, text = _line(reader).split("|")
            assert (kind, soon) == ("RefusedError", "True")
            assert "in another pid namespace" in text and text.endswith("list it as remote")
            near = MessageQueue.create_from_handle(joined, 0, settings=SETTINGS)
            writer.wait_until_ready(60)
            writer.enqueue("hello")
            assert _line(reader) == "hello" and near.dequeue() == "hello"
            near.close()
            reader.kill()
            began = time.monotonic()
            with pytest.raises(PeerDiedError, match="connections of rank 1 have ended"):
                for _ in range(4):
                    writer.enqueue("is anybody there?", timeout=30)
            assert time.monotonic() - began < SOON_S
        finally:
            reader.kill()
            reader.wait(20)


def test_a_writer_whose_proc_is_another_namespaces_serves_readers_over_tcp() -> None:
    pytest.importorskip("zmq", reason="remote readers need pyzmq")
    writer = _in_namespace(WRITER, proc=False)
    try:
        joined = pickle.loads(bytes.fromhex(_line(writer)))
        kind, text = _line(writer).split("|")
        assert kind == "RefusedError"
        assert "the /proc that this process sees is that of another pid namespace" in text
        with pytest.raises(RefusedError, match="list it as remote"):
            MessageQueue.create_from_handle(joined, 0, settings=SETTINGS)
        with MessageQueue.create_from_handle(joined, 1, settings=SETTINGS) as reader:
            assert reader.dequeue(timeout=60) == "from another namespace"
            writer.kill()
            began = time.monotonic()
            with pytest.raises(PeerDiedError, match="the writer is gone"):
                reader.dequeue(timeout=30)
            assert time.monotonic() - began < SOON_S
    finally:
        writer.kill()
        writer.wait(20)


def test_without_proc_a_reader_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "readlink", _no_proc)
    with MessageQueue(1, 1, settings=SETTINGS) as writer:
        assert process.pid_space() == process.pid_space() == writer.export_handle().pid_space
        with pytest.raises(RefusedError, match=r"this process has no /proc .*list it as remote"):
            handle.join_ring(writer.export_handle(), 0, SETTINGS)


def _no_proc(path: str) -> str:
    raise FileNotFoundError(2, "No such file or directory", path)


# --- what waiting costs ---------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["reader", "far reader", "writer"])
def test_whoever_waits_sleeps(which: str) -> None:
    """Under 0.05% of a core: some wake-ups a second, where looking every 3 ms takes 333."""
    if which == "far reader":
        writer, reader = far_ends()
    else:
        writer, (reader,) = both_ends(max_chunks=1)
    counted: list[tuple[int, float]] = []

    def switches() -> int:
        status = Path(f"/proc/self/task/{threading.get_native_id()}/status").read_text()
        return int(status.partition("voluntary_ctxt_switches:")[2].split()[0])

    def wait() -> None:
        with contextlib.suppress(CommunicatorError):
            if which == "writer":
                writer.enqueue(1)
                writer.enqueue(2, timeout=0.2)
            else:
                reader.dequeue(timeout=0.2)
        before = switches(), time.thread_time()
        with contextlib.suppress(CommunicatorError):
            _ = writer.enqueue(2, timeout=1.5) if which == "writer" else reader.dequeue(timeout=1.5)
        counted.append((switches() - before[0], time.thread_time() - before[1]))

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join()
    (woken, busy), allowed = counted[0], 1.5 / LOOK_S + 6
    assert woken <= allowed
    assert busy < 0.005, "spinning and this test's own work included"
    reader.close()
    writer.close()
