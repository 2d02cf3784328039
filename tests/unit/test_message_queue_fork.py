"""A forked child and the ends of its parent: refused in one sentence, and nothing is harmed."""

import subprocess
import sys

import pytest

pytest.importorskip("zmq", reason="remote readers need pyzmq")

#: Forks with all kinds of ends open; the child tries every call, then ends as programs end. Prints
#: what each call said, and whether the parent's ends work on.
PROGRAM = """
import gc, os, sys, threading
import numpy as np
from communicators.message_queue import native_end
from communicators.message_queue.ends import RingReader
from communicators.errors import CommunicatorError
from communicators.shm_broadcast import MessageQueue
def read_chunk(end):
    with end.acquire_read(5): pass

def write_chunk(end):
    with end.acquire_write(5): pass

def trial():
    writer = MessageQueue(2, 1)
    near, far = (MessageQueue.create_from_handle(writer.export_handle(), r) for r in (0, 1))
    only = MessageQueue(1, 1)
    reader = MessageQueue.create_from_handle(only.export_handle(), 0)
    reading = near, far, reader
    ready = [threading.Thread(target=end.wait_until_ready, args=(60,)) for end in reading]
    for thread in ready: thread.start()
    writer.wait_until_ready(60), only.wait_until_ready(60)
    for thread in ready: thread.join()
    only.enqueue(np.arange(100_000))
    view = reader.dequeue(copy=False)
    only.enqueue("unread"), writer.enqueue("unread")
    inside = threading.Thread(target=lambda: near.dequeue(60) + near.dequeue(60), daemon=True)
    inside.start()  # holds the lock of `near` while the child is made

    child = os.fork()
    if child == 0:
        calls = {
            "enqueue plain": lambda end: end.enqueue(1, 5),
            "enqueue pickled": lambda end: end.enqueue({1}, 5),
            "enqueue what cannot be pickled": lambda end: end.enqueue(lambda: 0, 5),
            "enqueue array": lambda end: end.enqueue(np.zeros(10_000), 5),
            "broadcast_object": lambda end: end.broadcast_object(1, 5),
            "dequeue": lambda end: end.dequeue(5),
            "dequeue view": lambda end: end.dequeue(5, copy=False),
            "acquire_read": read_chunk,
            "acquire_write": write_chunk,
            "wait_until_ready": lambda end: end.wait_until_ready(5),
        }
        for name, call in calls.items():
            for end in (writer, near, far, only, reader):
                try:
                    call(end)
                    print(f"{name} went through")
                except CommunicatorError as error:
                    refused = type(error).__name__ == "RefusedError"
                    if not refused or "this is its child" not in str(error):
                        print(f"{name}: {type(error).__name__}: {error}")
        assert writer.export_handle().n_reader == 2
        near.close()
        with writer, far: pass
        del view, writer, far, reader
        gc.collect()
        sys.exit(7)  # the interpreter ends as it does, with what is left of the queues

    assert os.waitpid(child, 0)[1] == 7 << 8, "the child did not end with its own code"
    assert (view == np.arange(100_000)).all()
    for _ in range(3):
        only.enqueue(np.zeros(100_000, np.int64))
    assert (view == np.arange(100_000)).all(), "the child let go of its parent's view"
    assert reader.dequeue(5) == "unread" and far.dequeue(5) == "unread"
    writer.enqueue("to both", 5)
    assert far.dequeue(5) == "to both"
    inside.join(5)
    assert not inside.is_alive()
    for end in (near, far, reader, only, writer): end.close()

trial()
native_end.module = lambda: None  # with the ends in Python
trial()
print("fine")
"""


def test_a_forked_child_is_refused_and_harms_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stdout + done.stderr
