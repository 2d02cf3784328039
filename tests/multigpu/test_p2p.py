"""NVML facts, the CUDA runtime through ctypes, and the peer-access probe on real GPUs."""

from __future__ import annotations

import ctypes
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from communicators import cli
from communicators.bindings.cuda_wrapper import CudaError, CudaRTLibrary
from communicators.peer_access import p2p
from communicators.peer_access.topology import Unknown, is_full_nvlink, local_facts, probe_gpus
from communicators.settings import Settings
from tests.ranks import Rank, run_fresh

pytestmark = [
    pytest.mark.multigpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMUNICATORS_CACHE_DIR", str(tmp_path))


def test_nvml_knows_the_gpus_that_cuda_uses() -> None:
    gpus = probe_gpus()
    assert not isinstance(gpus, Unknown)
    for ordinal in range(torch.cuda.device_count()):
        facts = local_facts(0, torch.device("cuda", ordinal), gpus)
        assert not isinstance(facts.device, Unknown), facts.device
        assert f"GPU-{torch.cuda.get_device_properties(ordinal).uuid}" == facts.device.gpu.uuid
        assert facts.device.gpu.name == torch.cuda.get_device_name(ordinal)
    claims = [is_full_nvlink([0, 1], 2), gpus[0].peer(gpus[1].uuid).nvlink]
    assert claims[0] == claims[1]


def _runtime(rank: Rank) -> None:
    cuda = CudaRTLibrary()
    assert cuda.cudaGetDeviceCount() == torch.cuda.device_count()
    cuda.cudaSetDevice(1)
    a, b = cuda.cudaMalloc(4096), cuda.cudaMalloc(4096)
    cuda.cudaMemset(a, 7, 4096)
    cuda.cudaMemcpyAsync(b, a, 4096)
    host = ctypes.create_string_buffer(4096)
    cuda.cudaMemcpy(ctypes.cast(host, ctypes.c_void_p), b, 4096)
    assert host.raw == bytes([7]) * 4096
    assert len(bytes(cuda.cudaIpcGetMemHandle(a))) == 64
    cuda.cudaFree(a)
    with pytest.raises(CudaError, match="cudaFree failed: "):
        cuda.cudaFree(ctypes.c_void_p(0x1234))
    with pytest.raises(CudaError, match=r"cudaSetDevice failed: .*\(cudaError_t 101\)"):
        cuda.cudaSetDevice(99)
    cuda.cudaFree(b)
    assert cuda.cudaDeviceCanAccessPeer(0, 1) in (True, False)
    cuda.cudaDeviceReset()


def test_the_real_cuda_runtime() -> None:
    (outcome,) = run_fresh(1, _runtime)
    assert outcome.trace == ""


def test_the_probe_moves_bytes_between_the_gpus() -> None:
    started = time.monotonic()
    assert list(p2p.can_actually_p2p([0, 1, 0], [1, 0, 0])) == [True] * 3
    assert time.monotonic() - started < 40


def test_the_probe_by_uuid_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = probe_gpus()
    assert not isinstance(gpus, Unknown)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"{gpus[1].uuid},{gpus[0].uuid}")
    settings = Settings.from_environment()
    proofs = p2p.probe(gpus[:2], settings)
    assert set(proofs.values()) == {None} and len(proofs) == 2
    started = time.monotonic()
    assert p2p.probe(gpus[:2], settings) == proofs
    assert time.monotonic() - started < 0.5  # from the cache
    assert p2p.gpu_p2p_access_check(0, 1)


def _verdict(rank: Rank, cache_dir: str) -> Any:
    torch.cuda.set_device(rank.rank)
    torch.ones(1, device="cuda")
    group = rank.group(cache_dir=cache_dir)
    return p2p.group_verdict(group, torch.device("cuda", rank.rank))


def test_one_verdict_for_two_ranks(tmp_path: Path) -> None:
    outcomes = run_fresh(2, _verdict, str(tmp_path), deadline_s=120)
    assert [o.trace for o in outcomes] == ["", ""]
    assert outcomes[0].value == outcomes[1].value and outcomes[0].value.refusal is None
    assert list(tmp_path.glob("p2p-*.json"))


def test_p2p_check_measures(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["p2p-check", "--json"]) == 0
    for pair in json.loads(capsys.readouterr().out)["pairs"]:
        assert pair["proven"] is True
        assert pair["read_gbps"] > 1 and pair["write_gbps"] > 1
        assert 0.2 < pair["latency_us"] < 100
    assert cli.main(["p2p-check"]) == 0  # from the cache
    print(capsys.readouterr().out)
