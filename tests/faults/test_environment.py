"""A job whose environment contradicts itself, or whose ranks do not all arrive."""

import os
import socket
import subprocess
import sys
import time

import pytest

from communicators import CommTimeoutError, InvalidArgumentError, TopologyError
from communicators import parallel_state as ps
from communicators.groups.stateless import StatelessProcessGroup

START = "from communicators import parallel_state as ps; ps.init_distributed_environment({})"


def start(code, **environment):
    cleared = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    inherited = {k: v for k, v in os.environ.items() if k not in cleared}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (
            {"world_size": 4},
            {"WORLD_SIZE": "2", "RANK": "0"},
            "world_size=4 contradicts WORLD_SIZE=2",
        ),
        ({"rank": 1}, {"WORLD_SIZE": "2", "RANK": "0"}, "rank=1 contradicts RANK=0"),
        ({}, {"WORLD_SIZE": "2", "RANK": "2"}, "rank 2 is not in 0..1"),
        ({}, {"WORLD_SIZE": "2", "RANK": "abc"}, "RANK='abc' is not accepted; it takes an integer"),
        ({}, {"WORLD_SIZE": "", "RANK": "0"}, "WORLD_SIZE='' is not accepted"),
        ({}, {"WORLD_SIZE": "2", "RANK": "-1"}, "RANK='-1' is not accepted"),
        ({}, {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "x"}, "LOCAL_RANK='x' is not accepted"),
        ({}, {"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR=None; env:// takes from it"),
        (
            {},
            {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "http"},
            "MASTER_PORT='http' is not accepted; it takes an integer from 1 to 65535",
        ),
        ({}, {"RANK": "0"}, "world_size was not given and WORLD_SIZE is not set"),
    ],
)
def test_a_contradiction_is_a_sentence(arguments, environment, message, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TopologyError) as caught:
        ps.init_distributed_environment(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///no/such/directory/store", "there is no directory /no/such/directory"),
        ("file:///tmp", "/tmp is not a file"),
        ("file://store", "with an absolute path"),
        ("tcp://127.0.0.1", "a port from 1 to 65535"),
        ("tcp://127.0.0.1:99999", "a port from 1 to 65535"),
        ("http://127.0.0.1:80", "'env://', 'tcp://host:port' or 'file:///path' is expected"),
        ("", "'env://', 'tcp://host:port' or 'file:///path' is expected"),
        ("tcp://127.0.0.1:{busy}", "the port is in use"),
    ],
)
def test_an_address_that_nobody_can_meet_at_is_refused_at_once(url, message, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        started = time.monotonic()
        with pytest.raises(InvalidArgumentError, match=message):
            ps.init_distributed_environment(2, 0, url.format(busy=busy.getsockname()[1]))
    assert time.monotonic() - started < 2


def test_a_listener_that_never_answers_ends_at_the_deadline(monkeypatch):
    monkeypatch.setenv("COMMUNICATORS_TIMEOUT_S", "1")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        where = f"127.0.0.1:{deaf.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(CommTimeoutError, match=f"{where} was reached and did not answer"):
            ps.init_distributed_environment(2, 1, f"tcp://{where}")
        assert time.monotonic() - started < 3
        with pytest.raises(CommTimeoutError, match=f"{where} was reached and did not answer"):
            StatelessProcessGroup.create(where.split(":")[0], deaf.getsockname()[1], 1, 2)


def test_ranks_that_never_arrive_are_named_within_the_deadline(tmp_path):
    common = {"WORLD_SIZE": "3", "COMMUNICATORS_TIMEOUT_S": "3"}
    code = START.format(f"distributed_init_method='file://{tmp_path}/store'")
    started = time.monotonic()
    processes = [start(code, RANK=str(rank), **common) for rank in (0, 2)]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "CommTimeoutError" in errors
        assert "for rank 1 of 3" in errors
    assert time.monotonic() - started < 30


def test_a_meeting_point_that_nobody_hosts():
    port = free_port()
    process = start(
        START.format(""),
        WORLD_SIZE="2",
        RANK="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
        COMMUNICATORS_TIMEOUT_S="3",
    )
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 1
    assert f"CommTimeoutError: rank 1 of 2: nobody could be reached at 127.0.0.1:{port}" in errors
