"""MessageQueue beside multiprocessing.Queue and pyzmq PUB/SUB over ipc, one run.

    scripts/bench_queue                    all rows, one reader and three
    scripts/bench_queue --markdown FILE    the tables of docs/benchmarks/queue.md
    scripts/bench_queue --soak 5000000     only: that many messages with checksums, three readers

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
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zmq

from communicators.shm_broadcast import MessageQueue
from scripts.bench_queue_systems import SPAWN, Multiprocessing, Ours, PyZmq, PyZmqOutOfBand

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

    def __init__(self, make: Callable[..., Any], readers: int, **options: Any) -> None:
        self.system = make(readers, **options)
        self.pipes, self.processes = [], []
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
                raise TimeoutError("a reader has not answered for 180 s")
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


OURS, MP, ZMQ, OOB = Ours, Multiprocessing, PyZmq, PyZmqOutOfBand
VIEWS = functools.partial(Ours, copy=False)
LABEL = {VIEWS: "MessageQueue, copy=False"}

CHECKED = [("small", 2000), ("pickled", 500), ("dictionary", 50), ("array", 30), ("tensor", 4)]

# row, what is compared, (method, arguments), better is, [(peer, bar)] of the table
ROWS: list[tuple[str, list[Any], str, tuple[Any, ...], bool]] = [
    ("100 B dict every 2 ms, one-way p50, us", [OURS, ZMQ, MP], "latency", (0.002, 500), False),
    ("100 B after 1 s of silence, p50, us", [OURS, ZMQ, MP], "latency", (1.0, 6), False),
    ("100 B dict, messages/s", [OURS, ZMQ, MP], "rate", ("small", 40000), True),
    ("100 B dict with a set, messages/s", [OURS, ZMQ, MP], "rate", ("pickled", 40000), True),
    ("10 KB dict, messages/s", [OURS, ZMQ, MP], "rate", ("dictionary", 1500), True),
    ("1 MB array, messages/s", [OURS, VIEWS, ZMQ, OOB, MP], "rate", ("array", 600), True),
    ("20 MB tensor, messages/s", [OURS, VIEWS, ZMQ, MP], "rate", ("tensor", 25), True),
    ("20 MB array, messages/s", [OURS, VIEWS, ZMQ, OOB, MP], "rate", ("big_array", 25), True),
    ("idle reader, % of a core", [OURS, ZMQ, MP], "idle", (10.0,), False),
]


#: What is aimed at: (row, whose, times better than each of these peers, or than every one of them)
GOALS: list[tuple[str, Any, list[tuple[list[Any], float]]]] = [
    (ROWS[0][0], OURS, [([ZMQ], 6), ([MP], 4)]),
    (ROWS[1][0], OURS, [([ZMQ], 2)]),
    ("100 B dict, messages/s", OURS, [([ZMQ], 2)]),
    ("10 KB dict, messages/s", OURS, [([ZMQ, MP], 1.2)]),
    ("1 MB array, messages/s", OURS, [([ZMQ], 2)]),
    ("1 MB array, messages/s", VIEWS, [([ZMQ], 3)]),
    ("20 MB tensor, messages/s", OURS, [([ZMQ, MP], 2)]),
    ("20 MB tensor, messages/s", VIEWS, [([ZMQ, MP], 3)]),
]


def label(make: Any) -> str:
    return LABEL.get(make) or make.name


def run(readers: int, repeat: int, only: str) -> list[tuple[str, dict[Any, float], bool]]:
    systems = [OURS, VIEWS, ZMQ, OOB, MP]
    rows = [row for row in ROWS if only in row[0]]
    benches = {make: Bench(make, readers) for make in systems if any(make in r[1] for r in rows)}
    for bench in benches.values():
        for kind, count in CHECKED:
            bench.check(kind, count)
    results = []
    for title, makes, method, arguments, more_is_better in rows:
        times = 1 if method == "idle" else repeat
        seen: dict[Any, list[float]] = {make: [] for make in makes}
        for _ in range(times):
            for make in makes:
                seen[make].append(getattr(benches[make], method)(*arguments))
        choose = max if more_is_better else min
        best = {make: choose(values) for make, values in seen.items()}
        results.append((title, best, more_is_better))
        print_row(readers, title, best, more_is_better)
    for bench in benches.values():
        bench.close()
    return results


def ratio(ours: float, theirs: float, more_is_better: bool) -> float:
    return ours / theirs if more_is_better else theirs / ours


def print_row(readers: int, title: str, best: dict[Any, float], more: bool) -> None:
    print(f"{readers} reader{'s' if readers > 1 else ''}: {title}", flush=True)
    peers = {m: v for m, v in best.items() if m in (ZMQ, OOB, MP)}
    for make, value in best.items():
        line = f"    {label(make):28} {value:10.4g}"
        if make not in peers and peers:
            line += "".join(
                f"   {ratio(value, v, more):5.1f} x {label(m)}" for m, v in peers.items()
            )
        print(line, flush=True)


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def markdown(readers: int, results: list[tuple[str, dict[Any, float], bool]]) -> str:
    """One table."""
    lines = [
        f"## {readers} reader{'s' if readers > 1 else ''}",
        "",
        "| | MessageQueue | pyzmq | pyzmq oob | mp.Queue | x pyzmq | x mp.Queue |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, best, more in results:
        for make in (OURS, VIEWS):
            if make not in best:
                continue
            value, zmq_value, mp_value = best[make], best[ZMQ], best[MP]
            name = title if make is OURS else f"{title}, {label(make).partition(', ')[2]}"
            oob = f"{number(best[OOB])}" if OOB in best else ""
            ratios = (f"{ratio(value, v, more):.1f}" for v in (zmq_value, mp_value))
            if title.startswith("idle"):
                ratios = iter(("", ""))
            cells = (name, number(value), number(zmq_value), oob, number(mp_value), *ratios)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def goals(results: dict[int, list[tuple[str, dict[Any, float], bool]]]) -> str:
    """The table of what is aimed at and what was reached."""
    readers = " | ".join(f"{n} reader{'s' if n > 1 else ''}" for n in results)
    lines = [f"| goal | {readers} |", "|---|" + "---|" * len(results)]
    for title, make, bars in GOALS:
        wanted, cells = [], []
        for peers, bar in bars:
            wanted.append(f"{bar:g} times better than {' and '.join(p.name for p in peers)}")
        for rows in results.values():
            found = [(best, more) for name, best, more in rows if name == title]
            for best, more in found:
                reached = []
                for peers, bar in bars:
                    times = min(ratio(best[make], best[p], more) for p in peers)
                    reached.append(f"{times:.1f}" + ("" if times >= bar else ", **not reached**"))
                cells.append("; ".join(reached))
        if cells:
            name = f"{title}, copy=False" if make is VIEWS else title
            lines.append(f"| {name}: {', '.join(wanted)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def soak(count: int) -> None:
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
    print(f"soak: {count} messages, 3 readers, {took:.0f} s, {count / took:.0f} a second: {codes}")
    if any(codes):
        raise SystemExit("soak: a reader found a wrong message")


def _soak_reader(handle: Any, rank: int, count: int) -> None:
    queue = MessageQueue.create_from_handle(handle, rank)
    queue.wait_until_ready(60)
    for i in range(count):
        number, crc, data = queue.dequeue(timeout=60, copy=bool(i & 1))
        if number != i or zlib.crc32(memoryview(data)) != crc:
            raise AssertionError(f"rank {rank}: message {i} arrived as {number}, or damaged")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--readers", type=int, nargs="*", default=[1, 3])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", default="", help="rows whose title contains this")
    parser.add_argument("--markdown", metavar="FILE", help="also write the tables there")
    parser.add_argument("--soak", type=int, metavar="MESSAGES")
    arguments = parser.parse_args()
    if arguments.soak:
        soak(arguments.soak)
        return
    kernel, python = os.uname().release.partition("-")[0], sys.version.split()[0]
    where = (
        f"{os.cpu_count()} cores, Linux {kernel}, Python {python}, "
        f"torch {torch.__version__}, pyzmq {zmq.__version__} (libzmq {zmq.zmq_version()})"
    )
    print(f"{where}, load {os.getloadavg()[0]:.1f}")
    results = {n: run(n, arguments.repeat, arguments.only) for n in arguments.readers}
    if arguments.markdown:
        tables = "\n".join(markdown(readers, rows) for readers, rows in results.items())
        Path(arguments.markdown).write_text(f"{goals(results)}\n{where}\n\n{tables}")


if __name__ == "__main__":
    main()
