"""MessageQueue beside multiprocessing.Queue and pyzmq PUB/SUB over ipc, one run.

One writer, and reader processes started with spawn. Every row is measured `--repeat` times, the
systems in turn within each repetition; the best of each is printed, since what else runs on the
machine only takes away, and the ratio to each peer.
Before anything is timed, every reader has checked the order and the content of all kinds of
messages. "one-way" is from before enqueue() in the writer to after dequeue() in the reader, on one
clock. Rates count from the first message sent, when all are made, until the last reader has the
last one.
multiprocessing.Queue has no broadcast: there is one for each reader. pyzmq has no bound on its
queues here, so that it loses nothing; "pyzmq oob" sends the buffers of protocol 5 as frames of
their own, without copies.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import random
import resource
import statistics
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import zmq

from communicators.cli.bench import driver, report
from communicators.cli.bench.record import Record, Row
from communicators.errors import CommTimeoutError, CommunicatorError
from communicators.shm_broadcast import MessageQueue

from ..peers.mp_queue import SPAWN, Multiprocessing
from ..peers.pyzmq import PyZmq, PyZmqOutOfBand

# --- the messages -----------------------------------------------------------------------------


def small(i: int) -> Any:
    return {"i": i, "ts": time.monotonic_ns(), "op": "step", "tokens": [1, 2, 3, i], "s": "x" * 24}


def pickled(i: int) -> Any:
    """The same with a set in it, which is not plain data: MessageQueue pickles it, as all do."""
    return {
        "i": i,
        "ts": time.monotonic_ns(),
        "op": {"step"},
        "tokens": [1, 2, 3, i],
        "s": "x" * 24,
    }


def dictionary(i: int) -> Any:
    """About 10 KB pickled: what a scheduler sends for a batch of 110 sequences."""
    return {
        "i": i,
        "ts": time.monotonic_ns(),
        "seqs": [
            {"id": f"request-{i}-{k}", "len": 100 + k, "blocks": list(range(k, k + 24)), "t": 0.7}
            for k in range(110)
        ],
    }


ARRAY = np.random.default_rng(0).integers(0, 255, 1 << 20, dtype=np.uint8)
TENSOR = torch.randint(0, 255, (20 << 20,), dtype=torch.uint8, generator=torch.manual_seed(0))


def array(i: int) -> Any:
    return {"i": i, "ts": time.monotonic_ns(), "x": ARRAY}


def tensor(i: int) -> Any:
    # A new one each time: mp.Queue moves a tensor to shared memory once, and then sends a name.
    return {"i": i, "ts": time.monotonic_ns(), "x": TENSOR.clone()}


def big_array(i: int) -> Any:
    # What mp.Queue and pyzmq do without torch's help.
    return {"i": i, "ts": time.monotonic_ns(), "x": TENSOR.numpy()}


MESSAGES = {f.__name__: f for f in (small, pickled, dictionary, array, tensor, big_array)}


def checksum(obj: Any) -> int:
    if isinstance(obj, (torch.Tensor, np.ndarray)):
        return zlib.crc32(np.asarray(obj).data)
    return zlib.crc32(repr({k: v for k, v in obj.items() if k not in ("ts", "x")}).encode())


# --- one run ----------------------------------------------------------------------------------


def reader_main(pipe: Any, make: Callable[..., Callable[[], Any]], *arguments: Any) -> None:
    torch.set_num_threads(1)
    receive = make(*arguments)
    pipe.send("joined")
    while (command := pipe.recv()) is not None:
        kind, count = command
        if kind == "check":
            for i in range(count):
                obj = receive()
                expected = obj["check"]
                del obj["check"]
                if obj["i"] != i or (checksum(obj), checksum(obj.get("x", {}))) != expected:
                    raise AssertionError(f"message {i} is not what was sent")
            pipe.send("checked")
        elif kind == "latency":
            waits = []
            for _ in range(count):
                obj = receive()
                waits.append(time.monotonic_ns() - obj["ts"])
            pipe.send(waits)
        elif kind == "rate":
            for i in range(count):
                if receive()["i"] != i:
                    raise AssertionError(f"message {i} was lost or came out of order")
            pipe.send(time.monotonic_ns())
        elif kind == "idle":
            before = resource.getrusage(resource.RUSAGE_SELF)
            receive()
            after = resource.getrusage(resource.RUSAGE_SELF)
            pipe.send(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


class Bench:
    """One system with its reader processes."""

    def __init__(self, make: Callable[..., Any], readers: int) -> None:
        self.system = make(readers)
        self.pipes: list[Any] = []
        self.processes: list[Any] = []
        for arguments in self.system.for_reader:
            ours, theirs = SPAWN.Pipe()
            process = SPAWN.Process(target=reader_main, args=(theirs, *arguments), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)
        self.system.ready()
        self._answers()

    def _answers(self) -> list[Any]:
        answers = []
        for pipe in self.pipes:
            if not pipe.poll(180):
                raise CommTimeoutError("a reader has not answered for 180 s")
            answers.append(pipe.recv())
        return answers

    def _command(self, *command: Any) -> None:
        for pipe in self.pipes:
            pipe.send(command)
        time.sleep(0.02)

    def check(self, kind: str, count: int) -> None:
        self._command("check", count)
        for i in range(count):
            obj = MESSAGES[kind](i)
            obj["check"] = (checksum(obj), checksum(obj.get("x", {})))
            self.system.send(obj)
        self._answers()

    def latency(self, gap: float, count: int) -> float:
        """The median one-way time, us."""
        self._command("latency", count)
        draw = random.Random(count)  # the same silences for all systems
        for i in range(count):
            # A tenth more or less: else it falls in step with what readers do periodically.
            time.sleep(gap * draw.uniform(0.9, 1.1))
            self.system.send(small(i))
        return statistics.median(w for waits in self._answers() for w in waits) / 1e3

    def rate(self, kind: str, count: int) -> float:
        """Messages a second."""
        self._command("rate", count)
        make, send = MESSAGES[kind], self.system.send
        made = [make(i) for i in range(count)]
        gc.freeze()  # so many objects are no work for the collector
        began = time.monotonic_ns()
        for obj in made:
            send(obj)
        return count / (max(self._answers()) - began) * 1e9

    def idle(self, seconds: float) -> float:
        """The largest share of a core, in percent, that a waiting reader used."""
        self._command("idle", 1)
        time.sleep(seconds)
        self.system.send(small(0))
        return 100 * max(self._answers()) / seconds

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(20)
        self.system.close()


# --- what is compared ---------------------------------------------------------------------------


class Ours:
    name = "MessageQueue"

    def __init__(self, readers: int, copy: bool = True) -> None:
        self.queue = MessageQueue(readers, readers)
        self.send = self.queue.enqueue
        self.for_reader = [(_ours, self.queue.export_handle(), i, copy) for i in range(readers)]

    def ready(self) -> None:
        self.queue.wait_until_ready(60)

    def close(self) -> None:
        self.queue.close()


def _ours(handle: Any, rank: int, copy: bool) -> Callable[[], Any]:
    queue = MessageQueue.create_from_handle(handle, rank)
    queue.wait_until_ready(60)
    return queue.dequeue if copy else functools.partial(queue.dequeue, copy=False)


VIEWS = functools.partial(Ours, copy=False)
LABEL: dict[Any, str] = {make: make.name for make in (Ours, PyZmq, PyZmqOutOfBand, Multiprocessing)}
LABEL[VIEWS] = "copy=False"
OURS = (LABEL[Ours], LABEL[VIEWS])
RATE = "messages/s"
MP, ZMQ, OOB = Multiprocessing, PyZmq, PyZmqOutOfBand

CHECKED = [("small", 2000), ("pickled", 500), ("dictionary", 50), ("array", 30), ("tensor", 4)]

# row, what is compared, (method, arguments), unit
ROWS: list[tuple[str, list[Any], str, tuple[Any, ...], str]] = [
    ("100 B dict every 2 ms, one-way p50", [Ours, ZMQ, MP], "latency", (0.002, 500), "us"),
    ("100 B after 1 s of silence, p50", [Ours, ZMQ, MP], "latency", (1.0, 6), "us"),
    ("100 B dict", [Ours, ZMQ, MP], "rate", ("small", 40000), RATE),
    ("100 B dict with a set", [Ours, ZMQ, MP], "rate", ("pickled", 40000), RATE),
    ("10 KB dict", [Ours, ZMQ, MP], "rate", ("dictionary", 1500), RATE),
    ("1 MB array", [Ours, VIEWS, ZMQ, OOB, MP], "rate", ("array", 600), RATE),
    ("20 MB tensor", [Ours, VIEWS, ZMQ, MP], "rate", ("tensor", 25), RATE),
    ("20 MB array", [Ours, VIEWS, ZMQ, OOB, MP], "rate", ("big_array", 25), RATE),
    ("idle reader", [Ours, ZMQ, MP], "idle", (10.0,), "% of a core"),
]

#: What is aimed at: (row, whose, times better than each of these peers)
GOALS: list[tuple[str, Any, dict[Any, float]]] = [
    (ROWS[0][0], Ours, {ZMQ: 6, MP: 4}),
    (ROWS[1][0], Ours, {ZMQ: 2}),
    ("100 B dict", Ours, {ZMQ: 2}),
    ("10 KB dict", Ours, {ZMQ: 1.2, MP: 1.2}),
    ("1 MB array", Ours, {ZMQ: 2}),
    ("1 MB array", VIEWS, {ZMQ: 3}),
    ("20 MB tensor", Ours, {ZMQ: 2, MP: 2}),
    ("20 MB tensor", VIEWS, {ZMQ: 3, MP: 3}),
]


def measured(readers: int, repeat: int, only: str) -> Iterator[Row]:
    selected = [row for row in ROWS if only in row[0]]
    makes = [make for make in (Ours, VIEWS, ZMQ, OOB, MP) if any(make in r[1] for r in selected)]
    benches = {make: Bench(make, readers) for make in makes}
    for bench in benches.values():
        for kind, count in CHECKED:
            bench.check(kind, count)
    for title, compared, method, arguments, unit in selected:
        seen: dict[Any, list[float]] = {make: [] for make in compared}
        for _ in range(1 if method == "idle" else repeat):
            for make in compared:
                seen[make].append(getattr(benches[make], method)(*arguments))
        more = method == "rate"
        best = {LABEL[make]: (max if more else min)(values) for make, values in seen.items()}
        yield Row({"readers": readers, "row": title}, best, unit, more)
    for bench in benches.values():
        bench.close()


def summary(record: Record) -> str:
    """What is aimed at, and what was reached."""
    lines = ["| goal | readers | reached |", "|---|---|---|"]
    for title, make, bars in GOALS:
        for row in record.rows:
            if row.key["row"] != title or LABEL[make] not in row.values:
                continue
            reached = {p: report.ratio(row, LABEL[make], p.name) or 0.0 for p in bars}
            wanted = ", ".join(f"{bar:g} times better than {p.name}" for p, bar in bars.items())
            cell = "; ".join(
                f"{times:.1f}" + ("" if times >= bars[p] else ", **not reached**")
                for p, times in reached.items()
            )
            name = f"{title}, {LABEL[make]}" if make is VIEWS else title
            lines.append(f"| {name}: {wanted} | {row.key['readers']} | {cell} |")
    return "\n".join(lines) if lines[2:] else ""


def soak(count: int) -> Row:
    """`count` messages with checksums through three readers, of sizes up to some 200 KB."""
    queue = MessageQueue(3, 3)
    readers = [
        SPAWN.Process(target=_soak_reader, args=(queue.export_handle(), rank, count))
        for rank in range(3)
    ]
    for process in readers:
        process.start()
    queue.wait_until_ready(60)
    payload = os.urandom(1 << 18)
    began = time.monotonic()
    for i in range(count):
        # Mostly small; every 100th some KB, every 1000th in the arena.
        size = i % 64 if i % 100 else i % 20000 if i % 1000 else i % 200000
        data = payload[:size]
        obj: Any = np.frombuffer(data, np.uint8) if i % 1000 == 0 else data
        queue.enqueue((i, zlib.crc32(data), obj), timeout=60)
    for process in readers:
        process.join(120)
    took = time.monotonic() - began
    codes = [process.exitcode for process in readers]
    queue.close()
    if any(codes):
        raise CommunicatorError(
            f"soak: a reader found a wrong message, or none; exit codes {codes} of 3 readers"
        )
    title = f"soak, {count} messages"
    return Row({"readers": 3, "row": title}, {LABEL[Ours]: count / took}, RATE, True)


def _soak_reader(handle: Any, rank: int, count: int) -> None:
    queue = MessageQueue.create_from_handle(handle, rank)
    queue.wait_until_ready(60)
    for i in range(count):
        number, crc, data = queue.dequeue(timeout=60, copy=bool(i & 1))
        if number != i or zlib.crc32(memoryview(data)) != crc:
            raise AssertionError(f"rank {rank}: message {i} arrived as {number}, or damaged")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    driver.add_ranks(parser, [1, 3], "readers")
    add = parser.add_argument
    add("--repeat", type=int, default=5)
    add("--only", default="", help="rows whose title contains this")
    add("--soak", type=int, metavar="MESSAGES",
        help="instead: that many messages with checksums, three readers")  # fmt: skip


def rows(options: argparse.Namespace, facts: dict[str, Any]) -> Iterator[Row]:
    facts["pyzmq"] = f"{zmq.__version__} (libzmq {zmq.zmq_version()})"
    if options.soak:
        yield soak(options.soak)
        return
    for readers in options.ranks:
        yield from measured(readers, options.repeat, options.only)
