"""The tensor-parallel job on GPUs: a captured decode step generates what the eager one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROMPTS = ("def main(", "import os\nimport ", "class Reader:\n    def __init__(self")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COMMUNICATORS_TIMEOUT_S": "60"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    "tp", [pytest.param(1, marks=pytest.mark.gpu), pytest.param(2, marks=pytest.mark.multigpu)]
)
def test_a_captured_step_gives_the_same_tokens(tmp_path: Path, tp: int) -> None:
    def tokens(*more: str) -> list[list[int]]:
        # fp32, so that no close call is decided by how a product was split.
        done = run(
            sys.executable, "-m", "scripts.tp_llama", "--device", "cuda",
            "--tp", str(tp), "--dtype", "float32", "--max-new-tokens", "64",
            "--tokens-file", str(tmp_path / "tokens.json"),
            *(f"--prompt={prompt}" for prompt in PROMPTS), *more,
        )  # fmt: skip
        assert ("the decode step captured" in done.stderr) == (not more)
        read: list[list[int]] = json.loads((tmp_path / "tokens.json").read_text())
        return read

    captured = tokens()
    assert captured == tokens("--no-graph")
    assert len(captured) == len(PROMPTS)


@pytest.mark.multigpu
def test_the_decode_benchmark_checks_and_times(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    command = [sys.executable, "-m", "scripts.bench", "decode", "--device", "cuda"]
    command += ["--shape", "tiny", "--layers", "2", "--context", "100", "--rounds", "2"]
    run(*command, "--json", str(path))
    found = json.loads(path.read_text())
    assert "CUDA graph" in found["machine"]["model"]
    assert [row["key"]["batch"] for row in found["rows"]] == [1, 32]
    assert all(row["values"]["dispatch"] > 0 for row in found["rows"])
