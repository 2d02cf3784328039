"""A job whose environment contradicts itself, or whose ranks do not all arrive."""

import os
import socket
import subprocess
import sys
import time

import pytest

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
        ("world_size=4", {"WORLD_SIZE": "2", "RANK": "0"}, "world_size=4 contradicts WORLD_SIZE=2"),
        ("rank=1", {"WORLD_SIZE": "2", "RANK": "0"}, "rank=1 contradicts RANK=0"),
        ("", {"WORLD_SIZE": "2", "RANK": "2"}, "rank 2 is not in 0..1"),
        ("", {"RANK": "0"}, "world_size was not given and WORLD_SIZE is not set"),
    ],
)
def test_a_contradiction_is_a_sentence(arguments, environment, message):
    process = start(START.format(arguments), **environment)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "TopologyError" in errors
    assert message in errors


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
    process = start(
        START.format(""),
        WORLD_SIZE="2",
        RANK="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=free_port(),
        COMMUNICATORS_TIMEOUT_S="3",
    )
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "CommTimeoutError: rank 1: the 2 ranks did not all come to env://" in errors
