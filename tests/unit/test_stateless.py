"""StatelessProcessGroup: real processes and a TCPStore, torch.distributed not initialised."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from communicators import Settings
from communicators.errors import CommTimeoutError, InvalidArgumentError
from communicators.groups.stateless import StatelessProcessGroup

SETTINGS = Settings(timeout_s=10.0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on_ranks(world_size: int, body: Any) -> list[Any]:
    port, results = free_port(), [None] * world_size

    def run(rank: int) -> None:
        group = StatelessProcessGroup.create("127.0.0.1", port, rank, world_size, settings=SETTINGS)
        results[rank] = body(group)
        group.close()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def test_objects_go_everywhere_without_torch_distributed() -> None:
    assert not dist.is_initialized()

    def body(group: StatelessProcessGroup) -> Any:
        if group.rank == 0:
            group.send_obj({"to": 2}, 2)
        received = group.recv_obj(0) if group.rank == 2 else None
        return group.all_gather_obj(group.rank * 10), group.broadcast_obj(group.rank, 1), received

    assert on_ranks(3, body) == [
        ([0, 10, 20], 1, None),
        ([0, 10, 20], 1, None),
        ([0, 10, 20], 1, {"to": 2}),
    ]
    assert not dist.is_initialized()


def test_two_groups_in_one_process_do_not_mix() -> None:
    def body(group: StatelessProcessGroup) -> Any:
        return group.all_gather_obj((group.port, group.rank))

    first, second = on_ranks(2, body), on_ranks(2, body)
    assert first[0][0][0] != second[0][0][0]
    assert [rank for _, rank in first[1]] == [0, 1]


def test_rank_0_takes_a_free_port_and_binds_to_its_host_alone() -> None:
    group = StatelessProcessGroup.create("127.0.0.1", 0, 0, 1, settings=SETTINGS)
    assert group.port > 0
    listening = subprocess.run(
        ["cat", "/proc/net/tcp"], capture_output=True, text=True, check=True
    ).stdout
    assert f"0100007F:{group.port:04X} 00000000:0000 0A" in listening
    assert f"00000000:{group.port:04X} 00000000:0000 0A" not in listening
    with pytest.raises(InvalidArgumentError, match="rank 0 cannot listen on 127"):
        StatelessProcessGroup.create("127.0.0.1", group.port, 0, 1, settings=SETTINGS)


def test_no_rank_0_and_a_missing_rank_end_within_the_deadline() -> None:
    started = time.monotonic()
    with pytest.raises(CommTimeoutError, match=r"rank 1 of 2.* nobody could be reached at 127"):
        StatelessProcessGroup.create(
            "127.0.0.1", free_port(), 1, 2, timeout_s=1.0, settings=SETTINGS
        )
    with pytest.raises(CommTimeoutError, match=r"waited 1 s .* for rank 1 of 2"):
        StatelessProcessGroup.create("127.0.0.1", 0, 0, 2, timeout_s=1.0, settings=SETTINGS)
    assert time.monotonic() - started < 10


def test_close_names_who_has_not_closed() -> None:
    late = threading.Event()

    def body(group: StatelessProcessGroup) -> Any:
        if group.rank == 1:
            return late.wait(10)
        with pytest.raises(CommTimeoutError, match="at 'close' for rank 1 of 2"):
            group.close(0.5)
        return late.set()

    on_ranks(2, body)


def test_real_processes_meet() -> None:
    code = """
import sys
from communicators import Settings
from communicators.groups.stateless import StatelessProcessGroup
rank = int(sys.argv[1])
group = StatelessProcessGroup.create("127.0.0.1", int(sys.argv[2]), rank, 2,
                                     settings=Settings(timeout_s=30.0))
print(group.all_gather_obj(f"from {rank}"))
group.close()
"""
    port = str(free_port())
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), port], stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    for rank in ranks:
        output, _ = rank.communicate(timeout=60)
        assert output.decode().strip() == "['from 0', 'from 1']" and rank.returncode == 0
