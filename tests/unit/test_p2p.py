"""p2p.py: the two processes of the probe, over a fake CUDA runtime that moves real bytes."""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from communicators.base import Refusal
from communicators.bindings.cuda_wrapper import CudaRTLibrary
from communicators.errors import CommunicatorError
from communicators.groups.group import Group
from communicators.peer_access import p2p
from communicators.peer_access.p2p_cache import P2PCache, PairResult
from communicators.peer_access.p2p_worker import MEASURED_BYTES, PROOF_BYTES, Report
from communicators.peer_access.topology import (
    GpuFacts,
    HostFacts,
    RankFacts,
    Unknown,
    VisibleGpu,
    probe_host,
)
from communicators.settings import Settings
from tests.unit.fakes import compile_fake
from tests.unit.test_topology import machine, uuid


@pytest.fixture(scope="module")
def cudart(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compile_fake("cudart", tmp_path_factory.mktemp("lib") / "libfake_runtime.so")


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "memory"
    folder.mkdir()
    monkeypatch.setenv("FAKE_CUDART_DIR", str(folder))
    monkeypatch.delenv("FAKE_CUDART_FAULTS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return folder


def settings(tmp_path: Path, **values: Any) -> Settings:
    return Settings(cache_dir=str(tmp_path / "cache"), **values)


def reasons(attempt: p2p.Attempt) -> tuple[str, str]:
    return attempt[0].reason, attempt[1].reason


def test_bytes_move_in_both_directions_and_nothing_stays(cudart: str, memory: Path) -> None:
    assert p2p.can_actually_p2p([0, 1, 0], [1, 0, 0], cudart=cudart) == [True, True, True]
    assert list(memory.iterdir()) == []


def test_each_kind_of_failure_has_its_own_sentence(
    cudart: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attempt(faults: str) -> p2p.Attempt:
        monkeypatch.setenv("FAKE_CUDART_FAULTS", faults)
        return p2p.try_pairs([(0, 1)], cudart=cudart)[0]

    ends = reasons(attempt("0>1:noaccess"))
    assert ends[0] == "" and "peer access is not supported between these two" in ends[1]
    ends = reasons(attempt("0>1:noread"))
    assert "of what it read" in ends[1] and "bytes are wrong" in ends[1]
    ends = reasons(attempt("0>1:nowrite"))
    assert "of what it wrote" in ends[0] and "bytes are wrong" in ends[0] and ends[1] == ""
    assert reasons(attempt("1>0:noaccess")) == ("", "")  # the other direction's fault


def test_a_wedged_driver_gives_an_answer_and_the_next_pair_gets_new_processes(
    cudart: str, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CUDART_FAULTS", "0>1:wedge")
    monkeypatch.setattr(p2p, "_PAIR_S", 4.0)
    started = time.monotonic()
    first, second = p2p.try_pairs([(0, 1), (1, 0)], cudart=cudart, timeout_s=40)
    assert time.monotonic() - started < 40
    assert "the producer and the consumer did not answer within 4 s" in first[0].reason
    assert not first[0].transient and reasons(second) == ("", "")


def test_a_crash_is_an_answer(cudart: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUDART_FAULTS", "1>0:crash")
    (attempt,) = p2p.try_pairs([(1, 0)], cudart=cudart)
    assert "the consumer process died with status -6" in "; ".join(reasons(attempt)) or (
        attempt[0].reason == "the other process of the probe ended"
    )
    assert isinstance(p2p.outcome(attempt), Refusal)


def test_the_deadline_of_all_pairs_holds(cudart: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUDART_FAULTS", "0>1:wedge,1>0:wedge")
    started = time.monotonic()
    attempts = p2p.try_pairs([(0, 1), (1, 0)], cudart=cudart, timeout_s=1.0)
    assert time.monotonic() - started < 8
    assert [attempt[0].reason != "" for attempt in attempts] == [True, True]
    assert "not tried within the deadline of 1 s" in attempts[1][0].reason
    assert isinstance(p2p.outcome(attempts[1]), Unknown)


def test_without_a_runtime_nothing_is_claimed_to_be_known() -> None:
    attempts = p2p.try_pairs([(0, 1), (1, 0)], cudart="/absent/libcudart.so")
    for attempt in attempts:
        assert isinstance(p2p.outcome(attempt), Unknown)
        assert "/absent/libcudart.so cannot be loaded" in attempt[0].reason


def test_no_memory_means_not_tried(
    cudart: str, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (attempt,) = p2p.try_pairs([(0, 1)], cudart=cudart, size=2 << 30)
    verdict = p2p.outcome(attempt)
    assert isinstance(verdict, Unknown) and "out of memory" in str(verdict)


def test_copies_are_measured_when_the_size_asks_for_it(cudart: str) -> None:
    (attempt,) = p2p.try_pairs([(0, 1)], cudart=cudart, size=4 * PROOF_BYTES)
    assert reasons(attempt) == ("", "") and MEASURED_BYTES > PROOF_BYTES
    measured = attempt[1].measured
    assert {"read_gbps", "write_gbps"} <= set(measured) <= {"read_gbps", "write_gbps", "latency_us"}
    assert all(value > 0 for value in measured.values())


def test_ordinals_follow_the_visible_devices(cudart: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUDART_FAULTS", "5>3:noaccess")
    attempts = p2p.try_pairs(
        [(0, 1), (1, 0)], cuda_visible_devices="GPU-3-x,GPU-5-y", cudart=cudart
    )
    assert reasons(attempts[0]) == ("", "")
    assert "peer access" in attempts[1][1].reason


def test_producer_and_consumer_work_over_any_queues(cudart: str, tmp_path: Path) -> None:
    handles: Any = queue.Queue()
    acknowledgements: Any = queue.Queue()
    results: Any = queue.Queue()
    # A copy of the library has memory of its own, as another process's would.
    second = CudaRTLibrary(shutil.copy(cudart, str(tmp_path / "second.so")))
    arguments = ([0], handles, acknowledgements, results)
    other = threading.Thread(target=p2p.producer, args=arguments, kwargs={"cuda": second})
    other.start()
    p2p.consumer(*arguments, "0,1", cuda=CudaRTLibrary(cudart))
    other.join(20)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert {results.get(timeout=1).role, results.get(timeout=1).role} == {"producer", "consumer"}


def test_a_silent_partner_is_reported(cudart: str) -> None:
    results: Any = queue.Queue()
    p2p.producer(
        [0], queue.Queue(), queue.Queue(), results, cuda=CudaRTLibrary(cudart), timeout_s=0.1
    )
    report: Report = results.get(timeout=1)
    assert report.reason == "the other process of the probe was silent"


def test_batches_of_different_lengths() -> None:
    with pytest.raises(ValueError, match="2 sources and 1 targets"):
        p2p.can_actually_p2p([0, 1], [0])


def test_the_probe_is_remembered_by_uuid_and_refreshed_on_request(
    cudart: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = machine(2)
    asked: list[Any] = []
    real = p2p.try_pairs

    def counted(pairs: Any, **options: Any) -> Any:
        asked.append((pairs, options["cuda_visible_devices"]))
        return real(pairs, **options)

    monkeypatch.setattr(p2p, "try_pairs", counted)
    monkeypatch.setenv("FAKE_CUDART_FAULTS", "1>0:noaccess")
    mine = settings(tmp_path)
    proofs = p2p.probe(gpus, mine, cudart=cudart)
    assert proofs[uuid(0), uuid(1)] is None
    assert "peer access" in str(proofs[uuid(1), uuid(0)])
    assert asked == [([(0, 1), (1, 0)], f"{uuid(0)},{uuid(1)}")]
    assert p2p.probe(gpus[::-1], mine, cudart=cudart) == proofs and len(asked) == 1
    monkeypatch.delenv("FAKE_CUDART_FAULTS")
    healed = p2p.probe(gpus, mine, refresh=True, cudart=cudart)
    assert healed == {(uuid(0), uuid(1)): None, (uuid(1), uuid(0)): None} and len(asked) == 2
    assert p2p.probe(gpus, mine, cudart=cudart) == healed and len(asked) == 2


def test_a_survey_measures_only_what_is_not_measured_yet(
    cudart: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(p2p, "MEASURED_BYTES", 2 * PROOF_BYTES)
    mine, gpus = settings(tmp_path), machine(2)
    assert all(not one.measured for one in p2p.survey(gpus, mine, cudart=cudart).values())
    measured = p2p.survey(gpus, mine, measure=True, cudart=cudart)
    assert all(one.failure is None and one.measured["read_gbps"] > 0 for one in measured.values())
    monkeypatch.setattr(p2p, "try_pairs", None)  # everything is known: nothing is started
    assert p2p.survey(gpus, mine, measure=True, cudart=cudart) == measured


def test_what_could_not_be_tried_is_left_out_and_not_remembered(tmp_path: Path) -> None:
    mine = settings(tmp_path)
    assert p2p.probe(machine(2), mine, cudart="/absent.so") == {}
    assert P2PCache(mine.cache_dir, probe_host(), "580.1").read() == {}


HOST = HostFacts("node0", "boot-0")
PAIR = ("GPU-a", "GPU-b")


def test_the_cache_is_readable_and_bound_to_boot_and_driver(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "cache"
    cache = P2PCache(str(folder), HOST, "580.1")
    works, fails = PairResult(None, {"read_gbps": 350.5}), PairResult(Refusal("wrong bytes"))
    cache.add({PAIR: works}, machine(2))
    cache.add({PAIR[::-1]: fails}, machine(2))  # joins what is there
    assert cache.read() == {PAIR: works, PAIR[::-1]: fails}
    content = json.loads(cache.path.read_text())
    assert cache.path.name == "p2p-boot-0-580.1.json"
    assert content["pairs"][0] == {
        "accessor": "GPU-a",
        "owner": "GPU-b",
        "works": True,
        "reason": "",
        "measured": {"read_gbps": 350.5},
    }
    assert P2PCache(str(folder), HostFacts("node0", "boot-1"), "580.1").read() == {}
    assert P2PCache(str(folder), HOST, "590.2").read() == {}
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".lock"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99, "pairs": []}'])
def test_a_broken_cache_is_an_empty_one(text: str, tmp_path: Path) -> None:
    cache = P2PCache(str(tmp_path), HOST, "580.1")
    cache.path.write_text(text)
    assert cache.read() == {}


def test_an_unwritable_cache_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    P2PCache(str(tmp_path / "file" / "below"), HOST, "580.1").add({PAIR: PairResult(None)}, [])
    assert "proofs of peer access are not remembered" in caplog.text


def test_a_user_without_a_home_has_a_cache_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert P2PCache("", HOST, "580.1").path.parent.name == f"communicators-{os.getuid()}"


def test_processes_that_cannot_be_started_leave_nothing_open(
    cudart: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Any = subprocess.Popen
    started: list[Any] = []

    def second_fails(*args: Any, **options: Any) -> Any:
        if started:
            raise OSError("no more processes")
        started.append(real(*args, **options))
        return started[0]

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(subprocess, "Popen", second_fails)
    with pytest.raises(OSError, match="no more processes"):
        p2p.try_pairs([(0, 1)], cudart=cudart)
    assert started[0].poll() is not None
    assert len(os.listdir("/proc/self/fd")) == before


def four_ranks(monkeypatch: pytest.MonkeyPatch, gpus: list[GpuFacts], mine: Settings) -> list[Any]:
    """group_verdict on a thread a rank, each with its own facts; answers or errors."""
    monkeypatch.setattr(
        p2p,
        "local_facts",
        lambda rank, device, known, settings: RankFacts(rank, HOST, VisibleGpu(gpus[rank])),
    )
    store = HashStore()
    answers: list[Any] = [None] * len(gpus)

    def run(rank: int) -> None:
        group = Group(store, rank, len(gpus), settings=mine)
        try:
            answers[rank] = p2p.group_verdict(group, torch.device("cuda:0"))
            assert p2p.group_verdict(group, torch.device("cuda:0")) is answers[rank]
        except CommunicatorError as error:
            answers[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(gpus))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return answers


def test_one_verdict_for_the_group_from_one_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes: list[int] = []

    def failing(gpus: Any, settings: Any) -> Any:
        probes.append(len(gpus))
        return {(uuid(2), uuid(3)): Refusal("0 bytes arrived")}

    monkeypatch.setattr(p2p, "probe", failing)
    answers = four_ranks(monkeypatch, machine(4), settings(tmp_path, timeout_s=20.0))
    assert probes == [4]  # rank 0 alone, once
    assert all(answer == answers[0] for answer in answers)
    assert str(answers[0].refusal) == (
        "GPU 2 does not reach the memory of GPU 3 in a real copy: 0 bytes arrived"
    )


def test_the_probe_is_skipped_where_claims_decide_or_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(gpus: Any, settings: Any) -> Any:
        raise AssertionError("probed")

    monkeypatch.setattr(p2p, "probe", never)
    pcie = machine(4, nvlink=lambda a, b: False)
    answers = four_ranks(monkeypatch, pcie, settings(tmp_path, timeout_s=20.0))
    assert all("without full NVLink" in str(answer.refusal) for answer in answers)
    trusting = settings(tmp_path, timeout_s=20.0, p2p_probe=False)
    assert all(a.refusal is None for a in four_ranks(monkeypatch, machine(4), trusting))


def test_a_probe_that_fails_on_rank_0_is_everybodys_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(gpus: Any, settings: Any) -> Any:
        raise OSError("no more processes")

    monkeypatch.setattr(p2p, "probe", broken)
    answers = four_ranks(monkeypatch, machine(2), settings(tmp_path, timeout_s=20.0))
    assert answers == ["the peer-access probe failed on rank 0: no more processes"] * 2


def test_the_predicate_only_looks_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMUNICATORS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(p2p, "try_pairs", None)  # starting anything would fail
    monkeypatch.setattr(p2p, "probe_gpus", lambda: machine(3, access=lambda a, b: b != 2))
    cache = P2PCache(str(tmp_path), probe_host(), "580.1")
    assert p2p.gpu_p2p_access_check(0, 0) and p2p.gpu_p2p_access_check(0, 1)
    assert not p2p.gpu_p2p_access_check(0, 2)  # claimed not
    wrong, works = PairResult(Refusal("wrong")), PairResult(None)
    cache.add({(uuid(0), uuid(1)): wrong, (uuid(0), uuid(2)): works}, [])
    assert not p2p.gpu_p2p_access_check(0, 1)  # proven not
    assert p2p.gpu_p2p_access_check(0, 2)  # proven
    assert p2p.gpu_p2p_access_check(1, 0)  # still the claim of the other direction
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"{uuid(2)},0")
    assert p2p.gpu_p2p_access_check(1, 0) and not p2p.gpu_p2p_access_check(0, 2)
    monkeypatch.setattr(p2p, "probe_gpus", lambda: Unknown("no NVML"))
    assert not p2p.gpu_p2p_access_check(0, 1)


def test_weak_contiguity() -> None:
    x = torch.arange(12.0).view(3, 4)
    assert p2p.is_weak_contiguous(x) and p2p.is_weak_contiguous(x.t())
    assert p2p.is_weak_contiguous(x[1:].t())
    assert not p2p.is_weak_contiguous(x[:, :2]) and not p2p.is_weak_contiguous(x[:2].t())
