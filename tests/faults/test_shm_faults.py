"""CPU shared memory when something is wrong: every survivor raises, soon, the right thing, and
nothing stays behind."""

from __future__ import annotations

import ctypes
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from communicators import CommTimeoutError, CommunicatorError, CpuCommunicator, Settings, shm
from tests.ranks import Outcome, Rank, Ranks, run_fresh

TIMEOUT_S = 1.5
SOON_S = 5.0  # what takes 20 ms on an idle machine; far below the deadlines it is held against


@pytest.fixture(autouse=True)
def nothing_left_in_dev_shm() -> Iterator[None]:
    def entries() -> set[str]:
        # Other tests of other processes come and go; their names are not ours.
        return {name for name in os.listdir("/dev/shm") if not name.startswith(("sem.", "torch_"))}

    before = entries()
    yield
    assert entries() <= before


def opened(rank: Rank, timeout_s: float = TIMEOUT_S) -> CpuCommunicator:
    cpu = CpuCommunicator(
        rank.group(timeout_s=30.0), torch.device("cpu"), Settings(timeout_s=timeout_s)
    )
    assert cpu.refusal is None, cpu.refusal
    return cpu


def stays_unusable(cpu: CpuCommunicator, error: Exception) -> None:
    """The next call says the same, at once."""
    started = time.monotonic()
    with pytest.raises(type(error), match=re.escape(str(error))):
        cpu.all_reduce_(torch.ones(3))
    assert time.monotonic() - started < 1.0


def call_differently(rank: Rank, case: str) -> None:
    cpu = opened(rank, timeout_s=30.0)
    odd = rank.rank == 1
    try:
        if case == "bytes":
            cpu.all_reduce_(torch.ones(20 if odd else 10))
        elif case == "large":
            cpu.all_reduce_(torch.ones(200_001 if odd else 200_000))
        elif case == "dtype":
            cpu.all_reduce_(torch.ones(10, dtype=torch.int32 if odd else torch.float32))
        elif case == "op":
            (cpu.all_gather if odd else cpu.all_reduce)(torch.ones(10))
        elif case == "root":
            cpu.gather(torch.ones(10), 1 if odd else 0)
            cpu.barrier()  # a gather's leaves do not wait: they see it in the next call
        elif case == "message" and odd:
            shm.send(cpu._handle, torch.ones(5), 0)
        elif case == "message" and rank.rank == 0:
            shm.recv_(cpu._handle, torch.ones(10), 1)
    except CommunicatorError as error:
        stays_unusable(cpu, error)
        raise
    if case == "message":
        cpu.barrier()


@pytest.mark.parametrize(
    ("case", "both"),
    [
        ("bytes", ("all_reduce of 40 bytes of float32", "all_reduce of 80 bytes of float32")),
        ("large", ("of 800000 bytes of float32", "of 800004 bytes of float32")),
        ("dtype", ("all_reduce of 40 bytes of float32", "all_reduce of 40 bytes of int32")),
        ("op", ("all_reduce of 40 bytes of float32", "all_gather of 40 bytes of float32")),
        ("root", ("gather of 40 bytes of float32 to rank 0", "float32 to rank 1")),
        ("message", ("recv of 40 bytes of float32 from rank 1", "send of 20 bytes of float32")),
    ],
)
@pytest.mark.parametrize("world", (2, 3))
def test_a_mismatch_names_both_calls_on_all_ranks(
    world: int, case: str, both: tuple[str, str]
) -> None:
    for outcome in run_fresh(world, call_differently, case):
        assert outcome.error == "CommMismatchError", outcome
        assert all(text in outcome.message for text in both), outcome.message
        assert outcome.seconds < 2 * SOON_S  # with the time to open it


def one_is_late(rank: Rank, op: str, late: int) -> None:
    cpu = opened(rank)
    cpu.barrier()
    if rank.rank == late:
        time.sleep(TIMEOUT_S + 1.5)
    x = torch.ones(100_000)
    try:
        if op == "recv" and rank.rank != late:
            cpu.recv_tensor_list(late)
        elif op == "broadcast":
            cpu.broadcast(x, late)
            cpu.barrier()
        elif op in ("barrier", "recv"):
            cpu.barrier()
        else:
            getattr(cpu, op)(x)
    except CommunicatorError as error:
        stays_unusable(cpu, error)
        raise


@pytest.mark.parametrize("op", ("all_reduce_", "all_gather", "barrier", "broadcast", "recv"))
def test_a_late_rank_is_named_within_the_deadline(op: str) -> None:
    outcomes = run_fresh(3, one_is_late, op, 2)
    for rank in (0, 1):
        assert outcomes[rank].error == "CommTimeoutError", outcomes[rank]
        assert re.search(r"for rank 2 \(pid \d+\)", outcomes[rank].message), outcomes[rank].message
        assert "waited 1.5 s" in outcomes[rank].message
    # The late one learns what became of the call when it arrives.
    assert outcomes[2].error == "CommTimeoutError", outcomes[2]


def work_for_ever(rank: Rank, seed: int) -> None:
    cpu = opened(rank, timeout_s=20.0)
    order = random.Random(seed)
    Path(f"/proc/{os.getpid()}/comm").write_text("rank-at-work")
    while True:
        kind, size = order.randrange(6), order.choice((1, 100, 30_000, 400_000))
        x = torch.ones(size)
        if kind == 0:
            cpu.all_reduce_(x)
        elif kind == 1:
            cpu.all_gather(x)
        elif kind == 2:
            cpu.gather(x, order.randrange(rank.world_size))
        elif kind == 3:
            cpu.broadcast(x, order.randrange(rank.world_size))
        elif kind == 4:
            cpu.reduce_scatter(torch.ones(size * rank.world_size))
        elif rank.rank == 0:
            cpu.send_tensor_list([x], 1)
        elif rank.rank == 1:
            cpu.recv_tensor_list(0)


def kill_one(world: int, victim: int, seed: int, after_s: float) -> tuple[list[Outcome], float]:
    """The outcomes, and how long after the kill the last survivor raised."""
    ranks = Ranks(world)
    killed_at = [0.0]

    def kill() -> None:
        names = [Path(f"/proc/{ranks.pid(r)}/comm") for r in range(world)]
        while not all(name.read_text().startswith("rank-at-work") for name in names):
            time.sleep(0.01)
        time.sleep(after_s)
        killed_at[0] = time.monotonic()
        os.kill(ranks.pid(victim), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        outcomes = ranks.outcomes(work_for_ever, seed)
        return outcomes, time.monotonic() - killed_at[0]
    finally:
        killer.join()
        ranks.kill()


@pytest.mark.parametrize("seed", range(8))
def test_sigkill_at_any_moment_is_noticed_at_once(seed: int) -> None:
    world = 2 + seed % 3
    victim = seed % world
    after_s = random.Random(seed).random() * 0.3
    outcomes, took = kill_one(world, victim, seed, after_s)
    assert took < SOON_S
    for rank, outcome in enumerate(outcomes):
        if rank == victim:
            assert outcome.killed
            continue
        assert outcome.error == "PeerDiedError", outcome
        assert re.search(rf"rank {victim} \(pid \d+\) died", outcome.message), outcome.message


def sum_once(rank: Rank, name: str) -> float:
    handle = shm.init_shm_manager(name, rank.world_size, rank.rank, Settings(timeout_s=10.0))
    shm.join_shm_manager(handle, name)
    x = torch.ones(1000)
    shm.shm_allreduce(handle, x)
    return float(x.sum())


def sum_and_die(rank: Rank, name: str) -> None:
    sum_once(rank, name)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_job_leaves_nothing_for_the_next_of_its_name() -> None:
    name = f"same-name-{os.getpid()}"
    for _ in range(2):
        assert all(outcome.killed for outcome in run_fresh(3, sum_and_die, name))
        assert [o.value for o in run_fresh(2, sum_once, name)] == [2000.0] * 2


def join_without_rank_1(rank: Rank, name: str) -> None:
    if rank.rank == 1:
        return
    handle = shm.init_shm_manager(name, rank.world_size, rank.rank, Settings(timeout_s=TIMEOUT_S))
    shm.join_shm_manager(handle, name)


def test_a_rank_that_never_joins_is_named() -> None:
    outcomes = run_fresh(3, join_without_rank_1, f"absent-{os.getpid()}")
    for rank in (0, 2):
        assert outcomes[rank].error == "CommTimeoutError"
        assert "no answer from rank 1;" in outcomes[rank].message
        assert outcomes[rank].seconds < TIMEOUT_S + SOON_S


def mount_tiny_tmpfs(target: str, size: str) -> str:
    """A tmpfs at `target` that only this process sees; empty when that is not allowed here."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, new_user, private, recursive = 0x20000, 0x10000000, 1 << 18, 1 << 14
    if libc.unshare(new_mounts) != 0 and libc.unshare(new_user | new_mounts) != 0:
        return ""
    libc.mount(b"none", b"/", None, private | recursive, None)
    if libc.mount(b"tmpfs", target.encode(), b"tmpfs", 0, b"size=" + size.encode()) != 0:
        return ""
    return target


def open_in_tiny_shm(rank: Rank, target: str) -> str:
    group = rank.group(timeout_s=10.0)
    directory = mount_tiny_tmpfs(target, "100k") if rank.rank == 1 else "/dev/shm"
    if not all(group.gather_objects("mounted", bool(directory))):
        return "skip"
    cpu = CpuCommunicator(group, torch.device("cpu"), Settings(shm_dir=directory))
    assert cpu.disabled
    with pytest.raises(CommunicatorError, match="bytes are needed in"):
        cpu.all_reduce_(torch.ones(3))
    return str(cpu.refusal)


def test_a_full_shm_is_a_refusal_on_all_ranks(tmp_path: Path) -> None:
    outcomes = run_fresh(3, open_in_tiny_shm, str(tmp_path))
    assert not any(outcome.error for outcome in outcomes), outcomes
    reasons = [outcome.value for outcome in outcomes]
    if "skip" in reasons:
        pytest.skip("this user may not mount a tmpfs in a namespace of its own")
    assert len(set(reasons)) == 1
    assert re.match(
        r"rank 1: allocation failed: shared memory: \d+ bytes are needed in /\S+, which has \d+ "
        r"bytes free of 102400; make it larger",
        reasons[0],
    ), reasons[0]


def open_with_settings(rank: Rank, settings: list[Settings]) -> str:
    group = rank.group(timeout_s=10.0)
    cpu = CpuCommunicator(group, torch.device("cpu"), settings[rank.rank])
    return str(cpu.refusal)


def test_a_missing_directory_and_too_few_bytes_are_refusals() -> None:
    good = Settings()
    nowhere = Settings(shm_dir="/does/not/exist")
    outcomes = run_fresh(2, open_with_settings, [good, nowhere])
    assert all("no file can be made in /does/not/exist" in o.value for o in outcomes), outcomes
    small = Settings(shm_bytes=5000)
    outcomes = run_fresh(2, open_with_settings, [small, small])
    assert all("(COMMUNICATORS_SHM_BYTES) are too few" in o.value for o in outcomes), outcomes
    outcomes = run_fresh(2, open_with_settings, [good, Settings(shm_bytes=1 << 20)])
    assert all("is laid out otherwise" in o.value for o in outcomes), outcomes


def test_timeouts_can_be_caught_as_timeout_error() -> None:
    assert issubclass(CommTimeoutError, TimeoutError)
