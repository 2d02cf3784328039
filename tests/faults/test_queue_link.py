"""MessageQueue between hosts that are network namespaces: a late reader, a broken link, a kill."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("zmq", reason="remote readers need pyzmq")

ROOT = Path(__file__).resolve().parents[2]
WRITER_IP, READER_IP = "10.231.77.1", "10.231.77.2"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


def _why_not() -> str | None:
    if shutil.which("ip") is None:
        return "the command ip (iproute2) is not installed"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    probe = f"mq-probe-{os.getpid()}"
    try:
        _ip("netns", "add", probe)
        _ip("-n", probe, "link", "add", "mq-a", "type", "veth", "peer", "name", "mq-b")
    except subprocess.CalledProcessError as error:
        return f"no network namespace can be made here: {error.stderr.decode().strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False, timeout=20)
    return None


_reason = _why_not()
pytestmark = pytest.mark.skipif(_reason is not None, reason=_reason or "")


class Hosts:
    """Two namespaces with a cable between them."""

    def __init__(self) -> None:
        self.names = [f"mq-{role}-{os.getpid()}" for role in ("writer", "reader")]
        writer, reader = self.names
        for name in self.names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", writer, "link", "add", "mq0", "type", "veth", "peer", "mq0", "netns", reader)
        for name, address in ((writer, WRITER_IP), (reader, READER_IP)):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "mq0")
            _ip("-n", name, "link", "set", "mq0", "up")

    def cable(self, state: str) -> None:
        _ip("-n", self.names[0], "link", "set", "mq0", state)

    def start(self, host: int, program: str, *arguments: str) -> subprocess.Popen[str]:
        command = ["ip", "netns", "exec", self.names[host], sys.executable, "-u", "-c", program]
        return subprocess.Popen(
            [*command, *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def close(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, timeout=20)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    made = Hosts()
    with contextlib.closing(made):
        yield made


WRITER = f"""
import pickle, sys, time
from communicators.errors import CommunicatorError
from communicators.shm_broadcast import MessageQueue
count, gap, readers = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
queue = MessageQueue(readers, 0, connect_ip="{WRITER_IP}")
print(pickle.dumps(queue.export_handle()).hex())
queue.wait_until_ready(60)
try:
    for i in range(count):
        time.sleep(gap)
        queue.enqueue((i, b"x" * (i * 997 % 50_000)), timeout=60)
    queue.close()
    print("done")
except CommunicatorError as error:
    print(type(error).__name__, error)
"""

READER = """
import pickle, sys, time
from communicators.errors import CommunicatorError, QueueClosedError
from communicators.shm_broadcast import MessageQueue
queue = MessageQueue.create_from_handle(pickle.loads(bytes.fromhex(sys.argv[1])), int(sys.argv[2]))
queue.wait_until_ready(60)
print("ready")
number = 0
try:
    while True:
        got, data = queue.dequeue(timeout=60)
        assert got == number and len(data) == number * 997 % 50_000, (got, number, len(data))
        number += 1
        if number % 50 == 0:
            print("at", number)
except QueueClosedError:
    print("all", number)
except CommunicatorError as error:
    print(type(error).__name__, error)
"""


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=90)
    return output


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("seconds", [3])
def test_a_link_that_breaks_for_some_seconds_loses_nothing(hosts: Hosts, seconds: float) -> None:
    writer = hosts.start(0, WRITER, "400", "0.005", "1")
    reader = hosts.start(1, READER, line(writer), "1")
    assert line(reader) == "ready"
    assert line(reader) == "at 50"
    hosts.cable("down")
    time.sleep(seconds)
    hosts.cable("up")
    assert finish(writer).strip() == "done"
    assert finish(reader).split("\n")[-2] == "all 400"


def test_a_reader_that_joins_late_over_a_link_that_is_down(hosts: Hosts) -> None:
    writer = hosts.start(0, WRITER, "100", "0", "1")
    handle = line(writer)
    hosts.cable("down")
    reader = hosts.start(1, READER, handle, "1")
    time.sleep(4)
    hosts.cable("up")
    assert finish(writer).strip() == "done"
    assert finish(reader).split("\n")[-2] == "all 100"


def test_a_killed_reader_on_another_host_is_dropped(hosts: Hosts) -> None:
    writer = hosts.start(0, WRITER, "400", "0.005", "2")
    handle = line(writer)
    made: list[Any] = [hosts.start(1, READER, handle, str(rank)) for rank in (1, 2)]
    for reader in made:
        assert line(reader) == "ready"
    assert line(made[0]) == "at 50"
    made[0].kill()
    assert finish(writer).strip() == "done"
    assert finish(made[1]).split("\n")[-2] == "all 400"


def test_a_killed_writer_on_another_host_ends_the_reader(hosts: Hosts) -> None:
    writer = hosts.start(0, WRITER, "4000", "0.005", "1")
    reader = hosts.start(1, READER, line(writer), "1")
    assert line(reader) == "ready"
    assert line(reader) == "at 50"
    writer.kill()
    began = time.monotonic()
    assert "PeerDiedError" in finish(reader)
    assert time.monotonic() - began < 10
