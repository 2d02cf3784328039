"""The native ends of MessageQueue: other Pythons, what stands in for them, signals, threads.

One binary serves every Python from 3.10 on; each that this machine has loads it and sends messages.
"""

import _thread
import ctypes
import gc
import importlib.util
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from communicators.bindings import native
from communicators.errors import CommTimeoutError, CommunicatorError, NativeLibraryError
from communicators.message_queue import native_end
from communicators.shm_broadcast import MessageQueue
from tests.unit.queue_processes import SETTINGS, both_ends, local_queue, readers

MESSAGES: list[Any] = [
    {"step": 1, "tokens": [1, 2, 3], "text": "ü" * 50, "t": 0.5, "flags": (True, None)},
    b"",
    [list(range(200))] * 2,
    {"shape": torch.float32},
    "x" * 5000,
    list(range(30_000)),
    np.arange(20_000),
    torch.Size([3]),
]


def same(a: Any, b: Any) -> bool:
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else type(a) is type(b) and a == b


@pytest.fixture
def no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_end, "module", lambda: None)


def interpreters() -> list[Path]:
    """Pythons 3.10 and later of this machine, one of each minor version."""
    names = [shutil.which(f"python3.{minor}") for minor in range(10, 20)]
    beside = sorted(Path(sys.base_prefix).parent.glob("3.*/bin/python3"))
    found: dict[str, Path] = {}
    for path in [*(Path(name) for name in names if name), *beside]:
        asked = subprocess.run(
            [path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
            capture_output=True,
            text=True,
            check=False,
        )
        version = asked.stdout.strip()
        if asked.returncode == 0 and tuple(map(int, version.split("."))) >= (3, 10):
            found.setdefault(version, path)
    return list(found.values())


SEND_AND_RECEIVE = """
import ctypes, gc, importlib.machinery, importlib.util, mmap, pickle, sys, threading
library, torch_cpu = sys.argv[1:]
ctypes.CDLL(torch_cpu, mode=ctypes.RTLD_GLOBAL)
loader = importlib.machinery.ExtensionFileLoader("_native_queue", library)
spec = importlib.util.spec_from_file_location("_native_queue", library, loader=loader)
module = importlib.util.module_from_spec(spec)
loader.exec_module(module)
ring = ctypes.CDLL(library)
memory = mmap.mmap(-1, 1 << 20)
base = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
wide = ctypes.c_uint64
ring.communicators_ring_create(base, 1, 4, wide(1000), wide(0), b"0" * 16, 0)
for function in (ring.communicators_ring_writer_open, ring.communicators_ring_reader_open):
    function.restype = ctypes.c_void_p
spins = wide(1000), wide(1000)
writing = ring.communicators_ring_writer_open(base, -1, wide(1 << 20), *spins)
reading = ring.communicators_ring_reader_open(base, 0, *spins)
assert ring.communicators_ring_join(ctypes.c_void_p(reading), 1, wide(1))
nothing = object()
writer = module.WriterEnd(writing, 1000)
reader = module.ReaderEnd(reading, pickle.loads, RuntimeError, nothing, -2, 10.0)
for i in range(50_000):
    sent = {"i": i, "list": [1, 2.5, None, True, (i, "x" * (i % 300))], "b": b"abc", i: 2**40 + i}
    assert writer.try_put(sent) == 1
    assert reader.get(None) == sent
assert writer.try_put({1, 2}) == 0 and reader.get(0) is nothing
assert writer.put_pickle(pickle.dumps({1, 2}))
assert reader.get(0) == {1, 2}
assert writer.put_pickle(b"\\x80\\x05nonsense") and writer.put_pickle(pickle.dumps({3}))
try:
    raise AssertionError(reader.get(0))
except RuntimeError as error:
    assert isinstance(error.__cause__, Exception)
assert reader.receive(0, False) == ({3},) and reader.receive(0, False) == 1
timer = threading.Timer(0.2, writer.try_put, ["late"])
timer.start()
assert reader.get(5) == "late"
assert reader.get(0.05) is nothing and 0.05 <= reader.waited() < 5
writer.detach(), reader.detach()
assert writer.try_put(1) == 0 and reader.get(0) is nothing
del writer, reader
gc.collect()
print("fine with", sys.version.split()[0])
"""


@pytest.mark.parametrize("python", interpreters(), ids=lambda path: path.parts[-3])
def test_one_binary_serves_every_python(python: Path) -> None:
    if native_end.module() is None:
        pytest.skip("there is no native module")
    origin = importlib.util.find_spec("torch")
    assert origin is not None and origin.origin is not None
    torch_cpu = Path(origin.origin).with_name("lib") / "libtorch_cpu.so"
    done = subprocess.run(
        [python, "-I", "-c", SEND_AND_RECEIVE, str(native.load("cpu")), str(torch_cpu)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.startswith("fine"), done.stderr


def test_the_module_is_there_where_it_can_be() -> None:
    library = ctypes.PyDLL(str(native.load("cpu")))
    assert (native_end.module() is not None) == hasattr(library, "PyInit__native_queue")


def test_a_module_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if native_end.module() is None:
        pytest.skip("there is no native module")
    monkeypatch.setattr(native, "__version__", "0.0.0")
    with pytest.raises(NativeLibraryError, match=r"the Python package is 0\.0\.0"):
        native.python_module.__wrapped__("_native_queue")


# --- what stands in for it ------------------------------------------------------------------------


def _collect(queue: MessageQueue, count: int) -> list[Any]:
    queue.wait_until_ready()
    return [queue.dequeue(copy=bool(i & 1)) for i in range(count)]


def test_without_the_module_the_queue_is_the_same(no_module: None) -> None:
    queue = local_queue(2, max_chunks=4)
    with readers(queue, [0, 1], _collect, 3 * len(MESSAGES)) as processes:
        queue.wait_until_ready()
        for obj in MESSAGES * 3:
            queue.enqueue(obj)
        for process in processes:
            assert all(map(same, MESSAGES * 3, process.result()))


@pytest.mark.parametrize("who", ["writer", "reader"])
def test_ends_of_both_kinds_understand_each_other(
    who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        if who == "writer":
            patch.setattr(native_end, "module", lambda: None)
        queue = local_queue(1)
    with monkeypatch.context() as patch:
        if who == "reader":
            patch.setattr(native_end, "module", lambda: None)
        reader = MessageQueue.create_from_handle(queue.export_handle(), 0, settings=SETTINGS)
    for obj in MESSAGES:
        queue.enqueue(obj)
    for obj in MESSAGES:
        assert same(obj, reader.dequeue())


def test_without_the_module_ends_close_and_time_out(no_module: None) -> None:
    writer, (reader,) = both_ends(max_chunks=2)
    with pytest.raises(CommTimeoutError):
        reader.dequeue(timeout=0.02)
    writer.enqueue(1)
    writer.enqueue(2)
    with pytest.raises(CommTimeoutError):
        writer.enqueue(3, timeout=0.02)
    assert [reader.dequeue(), reader.dequeue()] == [1, 2]
    writer.close()
    with pytest.raises(CommunicatorError, match="has closed it"):
        reader.dequeue()
    reader.close()
    with pytest.raises(CommunicatorError, match="this end was closed"):
        reader.dequeue()


# --- signals, threads, order ----------------------------------------------------------------------


class _Interrupts:
    """Raises KeyboardInterrupt when it is unpickled, the first time."""

    times = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return _interrupt, ()


def _interrupt() -> str:
    _Interrupts.times += 1
    if _Interrupts.times == 1:
        raise KeyboardInterrupt
    return "unpickled"


@pytest.mark.parametrize("size", [10, 10_000, 200_000], ids=["batch", "slot", "block"])
@pytest.mark.parametrize("with_module", [True, False])
def test_an_interrupted_dequeue_loses_no_message(
    size: int, with_module: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_module:
        monkeypatch.setattr(native_end, "module", lambda: None)
    writer, (reader,) = both_ends()
    _Interrupts.times = 0
    for obj in ("before", [_Interrupts(), b"x" * size], "after"):
        writer.enqueue(obj)
    assert reader.dequeue() == "before"
    with pytest.raises(KeyboardInterrupt):
        reader.dequeue()
    assert reader.dequeue() == ["unpickled", b"x" * size]
    assert reader.dequeue() == "after"


def test_handlers_that_run_while_messages_stream_lose_none() -> None:
    writer, (reader,) = both_ends()
    got: list[int] = []
    stop = threading.Event()

    def write() -> None:
        for i in range(30_000):
            writer.enqueue({"i": i}, timeout=60)
        stop.set()

    def interrupt() -> None:
        while not stop.wait(0.002):
            _thread.interrupt_main()

    before = signal.signal(signal.SIGINT, lambda *_: interrupted.append(len(got)))
    interrupted: list[int] = []
    threads = [threading.Thread(target=write), threading.Thread(target=interrupt)]
    try:
        for thread in threads:
            thread.start()
        while len(got) < 30_000:
            got.append(reader.dequeue(timeout=60)["i"])
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
        signal.signal(signal.SIGINT, before)
    assert got == list(range(30_000))
    assert interrupted


def test_a_wait_runs_handlers_and_goes_on() -> None:
    writer, (reader,) = both_ends()
    ran: list[float] = []
    before = signal.signal(signal.SIGALRM, lambda *_: ran.append(time.monotonic()))
    timer = threading.Timer(0.3, writer.enqueue, ["after the signals"])
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        timer.start()
        assert reader.dequeue(timeout=30) == "after the signals"
        with pytest.raises(CommTimeoutError, match=r"waited 0\.2 s"):
            reader.dequeue(timeout=0.2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        timer.join()
    assert len(ran) >= 5


def test_an_end_has_a_lock() -> None:
    if native_end.module() is None:
        pytest.skip("there is no native module")
    writer, (reader,) = both_ends()
    for lock in (writer._end, reader._end):
        with pytest.raises(RuntimeError, match="release"):
            lock.release()
        assert lock.acquire() and not lock.acquire(False)
        began = time.monotonic()
        assert not lock.acquire(timeout=0.1)
        assert 0.1 <= time.monotonic() - began < 5
        inside: list[int] = []

        def take(lock: Any = lock, inside: list[int] = inside) -> None:
            for _ in range(300):
                assert lock.acquire(timeout=60)
                inside.append(len(inside))
                time.sleep(0)  # whoever else were inside would append the same
                assert inside[-1] == len(inside) - 1
                lock.release()

        threads = [threading.Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        lock.release()
        for thread in threads:
            thread.join(60)
        assert inside == list(range(4 * 300))


def test_a_timeout_is_waited_once() -> None:
    _, (reader,) = both_ends()
    for timeout in (0.3, 1):
        began = time.monotonic()
        with pytest.raises(CommTimeoutError):
            reader.dequeue(timeout=timeout)
        assert timeout <= time.monotonic() - began < timeout + 0.25


def test_messages_of_all_ways_keep_their_order() -> None:
    """Plain ones, pickles, slots, blocks and raw chunks, through one queue, with threads around."""
    writer, (reader,) = both_ends(max_chunks=4)
    kinds: list[Any] = [{"plain": 1}, {1, 2}, "y" * 9000, {"z": "w" * 9000, 1: {3}}, b"v" * 99_999]

    def write() -> None:
        for i in range(500):
            writer.enqueue((i, kinds[i % len(kinds)]), timeout=60)

    thread = threading.Thread(target=write)
    thread.start()
    for i in range(500):
        assert reader.dequeue(timeout=60) == (i, kinds[i % len(kinds)])
    thread.join(60)


def test_a_finalizer_may_use_the_queue() -> None:
    """The collector runs inside of calls; what it runs may send and receive."""
    writer, (reader,) = both_ends()
    got: list[Any] = []

    class Chatty:
        def __init__(self) -> None:
            self.myself = self

        def __del__(self) -> None:
            writer.enqueue({"from": "a finalizer"})

    thresholds = gc.get_threshold()
    gc.set_threshold(5, 2, 2)
    try:
        for i in range(300):
            Chatty()
            writer.enqueue({"i": i, "list": [[i], [i]]})
            while not got or got[-1].get("i") != i:
                got.append(reader.dequeue(timeout=10))
    finally:
        gc.set_threshold(*thresholds)
        gc.collect()
    assert [m["i"] for m in got if "i" in m] == list(range(300))


def test_an_end_in_use_by_a_signal_handler_can_be_closed_there() -> None:
    writer, (reader,) = both_ends()
    before = signal.signal(signal.SIGALRM, lambda *_: reader.close())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(CommunicatorError, match="closed"):
            reader.dequeue(timeout=30)
    finally:
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(CommunicatorError, match="closed"):
        reader.dequeue()
    writer.close()


def test_what_cannot_be_unpickled_is_used_up_and_says_why() -> None:
    writer, (reader,) = both_ends()
    stream = pickle.dumps(os.getcwd)[:-3] + b"\xff."
    assert writer._end.put_pickle(stream)
    writer.enqueue({"next": 1})
    with pytest.raises(CommunicatorError, match="cannot be unpickled") as caught:
        reader.dequeue()
    assert caught.value.__cause__ is not None
    assert reader.dequeue() == {"next": 1}


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    gc.collect()
