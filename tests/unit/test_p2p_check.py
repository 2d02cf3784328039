"""`communicators p2p-check` over made-up GPUs and the fake CUDA runtime."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from communicators import cli
from communicators.peer_access import p2p, topology
from communicators.peer_access.p2p_worker import PROOF_BYTES
from communicators.peer_access.topology import GpuFacts, Unknown
from tests.unit.fakes import compile_fake
from tests.unit.test_topology import machine, uuid


@pytest.fixture(scope="module")
def cudart(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compile_fake("cudart", tmp_path_factory.mktemp("lib") / "libfake_runtime.so")


@pytest.fixture
def two_gpus(cudart: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[GpuFacts]:
    """Two GPUs for NVML and for CUDA, and an empty cache."""
    (tmp_path / "memory").mkdir()
    monkeypatch.setenv("FAKE_CUDART_DIR", str(tmp_path / "memory"))
    monkeypatch.setenv("COMMUNICATORS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FAKE_CUDART_FAULTS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(p2p, "MEASURED_BYTES", 2 * PROOF_BYTES)
    monkeypatch.setattr(p2p, "find_loaded_library", lambda name: cudart)
    gpus = machine(2)
    monkeypatch.setattr(topology, "probe_gpus", lambda: gpus)
    return gpus


def test_the_matrix(two_gpus: list[GpuFacts], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["p2p-check"]) == 0
    text = capsys.readouterr().out
    assert "GPU 0  NVIDIA H200  0000:00:00.0  " + uuid(0) in text
    lines = text.splitlines()
    at = lines.index("access, claimed/proven")
    assert lines[at + 1].split() == ["GPU", "0", "GPU", "1"]
    assert lines[at + 2].split() == ["GPU", "0", "-", "yes/yes"]
    assert lines[at + 3].split() == ["GPU", "1", "yes/yes", "-"]
    assert lines[lines.index("connection") + 2].split() == ["GPU", "0", "-", "NV18"]
    row = lines[lines.index("read by the copy engine, GB/s") + 2].split()
    assert float(row[3]) > 0
    assert lines[-1] == "kernels on peers' memory: may be used"


def test_a_disproven_claim_is_an_exit_status_and_refresh_heals(
    two_gpus: list[GpuFacts],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAKE_CUDART_FAULTS", "1>0:noread")
    assert cli.main(["p2p-check", "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    first, second = content["pairs"]
    assert (first["accessor"], first["owner"], first["proven"]) == (0, 1, True)
    assert first["write_gbps"] > 0 and first["nvlinks"] == 18 and "latency_us" in first
    assert second["claimed_read"] is True and second["proven"] is False
    assert "of what it read" in second["reason"] and second["write_gbps"] is None
    assert "does not reach the memory of GPU 0" in content["refusal"]
    monkeypatch.delenv("FAKE_CUDART_FAULTS")
    assert cli.main(["p2p-check", "--no-measure"]) == 1  # remembered
    assert "GPU 1 -> memory of GPU 0: consumer: of what it read" in capsys.readouterr().out
    assert cli.main(["p2p-check", "--no-measure", "--refresh"]) == 0


def test_a_wedged_driver_is_answered_within_the_deadline(
    two_gpus: list[GpuFacts],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAKE_CUDART_FAULTS", "0>1:wedge")
    monkeypatch.setattr(p2p, "_PAIR_S", 3.0)
    assert cli.main(["p2p-check", "--deadline", "30", "--no-measure"]) == 1
    text = capsys.readouterr().out
    assert "yes/NO" in text and "yes/yes" in text and "did not answer within 3 s" in text


def test_what_could_not_be_tried_is_a_question_mark(
    two_gpus: list[GpuFacts],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(p2p, "find_loaded_library", lambda name: "/absent/libcudart.so")
    assert cli.main(["p2p-check", "--json"]) == 1
    pairs = json.loads(capsys.readouterr().out)["pairs"]
    assert [pair["proven"] for pair in pairs] == [None, None]
    assert cli.main(["p2p-check"]) == 1
    assert "yes/?" in capsys.readouterr().out


def test_a_heat_map_is_drawn(two_gpus: list[GpuFacts], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main(["p2p-check", "--plot", str(tmp_path / "matrix.png")]) == 0
    assert (tmp_path / "matrix.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("visible", "status"), [("1", 0), ("", 0)])
def test_fewer_than_two_gpus(
    visible: str,
    status: int,
    two_gpus: list[GpuFacts],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert cli.main(["p2p-check", "--json"]) == status
    assert "peer access needs two" in json.loads(capsys.readouterr().out)["error"]


def test_without_nvml(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "probe_gpus", lambda: Unknown("NVML does not start"))
    assert cli.main(["p2p-check"]) == 1
    assert capsys.readouterr().out == "p2p-check: NVML does not start\n"


def test_listing_the_options_imports_no_torch() -> None:
    code = "import sys, communicators.cli.p2p_check; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_subcommand_can_join_another_parser() -> None:
    import argparse

    from communicators.cli import p2p_check

    parser = argparse.ArgumentParser()
    p2p_check.add_parser(parser.add_subparsers(dest="command"))
    given: Any = parser.parse_args(["p2p-check", "--deadline", "3"])
    assert given.deadline == 3.0 and not given.refresh
