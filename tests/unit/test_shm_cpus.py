"""Which CPUs the ranks of a group have together: who may spin, and with how many threads."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
from pathlib import Path

import pytest
import torch

from communicators import CpuCommunicator
from tests.ranks import Rank, run_fresh

ROOT = Path(__file__).parents[2]
CPUS = sorted(os.sched_getaffinity(0))
two_cores = pytest.mark.skipif(len(CPUS) < 2, reason="needs two cores")


def plan(rank: Rank, cpus: list[list[int]], threads: int) -> tuple[bool, int]:
    """What a group of ranks decides that were pinned to `cpus` before it opened."""
    os.sched_setaffinity(0, cpus[rank.rank])
    torch.set_num_threads(threads)
    cpu = CpuCommunicator(rank.group(timeout_s=30.0), torch.device("cpu"))
    assert cpu.refusal is None, cpu.refusal
    spins, lanes = torch.ops.communicators.shm_plan(cpu._handle)
    cpu.close()
    return bool(spins), lanes


@two_cores
@pytest.mark.parametrize(
    ("cpus", "spins"),
    (
        ([[0], [1]], True),  # as vLLM pins its workers
        ([[0, 1], [0]], True),
        ([[0, 1], [0, 1]], True),
        ([[1], [1]], False),
        ([[0], [1], [0, 1]], False),
    ),
    ids=str,
)
def test_ranks_spin_where_each_has_a_core(cpus: list[list[int]], spins: bool) -> None:
    where = [[CPUS[index] for index in one] for one in cpus]
    answers = [outcome.value for outcome in run_fresh(len(cpus), plan, where, 8)]
    assert answers == [(spins, 1)] * len(cpus)  # two cores: no rank has two of them


PROGRAM = r"""
#include <cstdio>
#include <memory>
#include <vector>
#include "shm/cpus.h"
// Arguments: ranks as "first-last:quota:cgroup:threads". Prints core_each and threads.
int main(int count, char** given) {
  std::vector<std::unique_ptr<shm::Cpus>> all;
  std::vector<const shm::Cpus*> ranks;
  for (int i = 1; i < count; ++i) {
    unsigned first, last, cgroup;
    auto cpus = std::make_unique<shm::Cpus>();
    std::sscanf(given[i], "%u-%u:%lf:%u:%d", &first, &last, &cpus->quota, &cgroup, &cpus->threads);
    cpus->cgroup = cgroup;
    for (unsigned c = first; c <= last; ++c) cpus->mask[c / 64] |= uint64_t{1} << (c % 64);
    ranks.push_back(cpus.get());
    all.push_back(std::move(cpus));
  }
  const shm::Plan plan = shm::plan_cpus(ranks);
  std::printf("%d %d\n", plan.core_each, plan.threads);
}
"""


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("cpus")
    source, program = folder / "plan.cpp", folder / "plan"
    source.write_text(PROGRAM)
    native = ROOT / "native"
    files = [str(source), str(native / "shm/cpus.cpp"), "-o", str(program)]
    subprocess.run([compiler, "-std=c++20", "-O1", f"-I{native}", *files], check=True)
    return program


@pytest.mark.parametrize(
    ("ranks", "expected"),
    (
        (["0-15:1e9:1:16"] * 4, (1, 4)),
        (["0-3:1e9:1:16", "4-7:1e9:1:16", "8-11:1e9:1:16", "12-15:1e9:1:16"], (1, 4)),
        (["0-0:1e9:1:1", "1-1:1e9:1:1"], (1, 1)),
        (["0-15:1e9:1:2"] * 4, (1, 2)),  # threads that torch has
        (["0-15:1e9:1:16"] * 3, (1, 5)),
        (["0-1:1e9:1:2"] * 3, (0, 1)),
        (["0-0:1e9:1:9", "0-0:1e9:1:9", "1-63:1e9:1:9"], (0, 1)),  # enough in all, not for each
        (["0-1:1e9:1:9", "0-0:1e9:1:9"], (1, 1)),  # the first one leaves CPU 0 to the second
        (["0-2:1e9:1:9", "0-1:1e9:1:9", "0-0:1e9:1:9"], (1, 1)),
        (["0-15:4:1:16"] * 4, (1, 1)),  # one cgroup's quota for all
        (["0-15:3:1:16"] * 4, (0, 1)),
        (["0-15:2:1:16", "0-15:2:2:16"], (1, 2)),  # containers with a quota each
        (["1000-1003:1e9:1:16", "4092-4095:1e9:1:16"], (1, 4)),
        (["0-255:1e9:1:16"] * 64, (1, 4)),
        (["0-62:1e9:1:16"] * 64, (0, 1)),
    ),
    ids=str,
)
def test_the_plan(planner: Path, ranks: list[str], expected: tuple[int, int]) -> None:
    printed = subprocess.run([planner, *ranks], check=True, capture_output=True, text=True).stdout
    assert tuple(map(int, printed.split())) == expected


def latencies(rank: Rank, pinned: bool) -> list[float]:
    """Microseconds of 8-byte sums, each after 60 us of other work."""
    if pinned:
        os.sched_setaffinity(0, [CPUS[rank.rank]])
    cpu = CpuCommunicator(rank.group(timeout_s=30.0), torch.device("cpu"))
    x = torch.zeros(2)
    took = []
    for _ in range(2000):
        ends = time.perf_counter() + 60e-6
        while time.perf_counter() < ends:
            pass
        started = time.perf_counter()
        cpu.all_reduce_(x)
        took.append((time.perf_counter() - started) * 1e6)
    cpu.close()
    return took[200:]


@two_cores
def test_pinned_ranks_do_not_sleep() -> None:
    """A futex's wake-up takes some 50 us; the bound leaves room for a loaded machine."""
    times = [
        statistics.median(time for o in run_fresh(2, latencies, pinned) for time in o.value)
        for pinned in (False, True)
    ]
    assert times[1] < max(2 * times[0], 10.0), times
