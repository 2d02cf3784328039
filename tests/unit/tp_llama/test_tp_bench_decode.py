"""The decode benchmark on two CPU ranks, and the check that it makes before it times."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from communicators.cli.bench import report
from communicators.cli.bench.record import read
from scripts.bench import __main__ as bench
from scripts.bench.cases.decode import (
    DISPATCH,
    WITHOUT,
    add_arguments,
    check,
    model_config,
    tolerance,
)
from scripts.tp_llama.errors import JobError

ROOT = Path(__file__).parents[3]
ONE_RANK: Any = SimpleNamespace(
    rank_in_group=0,
    world_size=1,
    device=torch.device("cpu"),
    all_gather=lambda x, dim: x,
    broadcast_object=lambda obj, src: obj,
    group=SimpleNamespace(gather_objects=lambda tag, value: [value]),
)


def test_one_command_compares_two_ways(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "scripts.bench", "decode", "--device", "cpu", "--explain"),
            *("--layers", "2", "--context", "40", "--rounds", "2", "--replays", "4"),
            *("--batch", "1", "3", "--json", "r.json", "--markdown", "r.md"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "not opened: cpu_shm: disabled by COMMUNICATORS_DISABLE" in done.stderr
    found = read(tmp_path / "r.json")
    assert [row.key["batch"] for row in found.rows] == [1, 3]
    for row in found.rows:
        assert row.notes["gloo chose"].startswith("torch_distributed, ")
        assert row.notes[f"{DISPATCH} chose"].startswith("cpu_shm, ")
        assert row.key["all-reduce of, bytes"] == row.key["batch"] * 256 * 2
        assert set(row.values) == {"gloo", DISPATCH, WITHOUT} and min(row.values.values()) > 0
        low, high = map(float, row.notes[f"{DISPATCH}, p10 to p90"].split(" to "))
        assert low - 0.1 <= row.values[DISPATCH] <= high + 0.1
    table = "\n".join(report.table(found))
    assert table in done.stdout and table in (tmp_path / "r.md").read_text()


def check_of(ours: torch.Tensor, without: torch.Tensor | None = None) -> float:
    expected = torch.linspace(-1, 1, 100)
    logits = {
        "NCCL": expected,
        DISPATCH: ours,
        WITHOUT: -expected if without is None else without,
    }
    steps: Any = {name: (lambda x=x: x) for name, x in logits.items()}
    return check(steps, "NCCL", 0.01, ONE_RANK)


def test_the_check_before_timing() -> None:
    right = torch.linspace(-1, 1, 100)
    assert check_of(right) == 0
    assert check_of(right * 1.005) == pytest.approx(0.005, rel=1e-3)
    with pytest.raises(JobError, match=r"dispatch is 0.02 off NCCL; allowed is 0.01"):
        check_of(right * 1.02)
    with pytest.raises(JobError, match="logits of dispatch are not finite"):
        check_of(right.clone().index_fill_(0, torch.tensor([3]), torch.nan))
    with pytest.raises(JobError, match="would not notice collectives that do nothing"):
        check_of(right, without=right * 1.03)


def test_shapes_and_their_parts() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = parser.parse_args([])
    config = model_config(options, "cuda")
    assert (config.hidden_size, config.num_key_value_heads, config.vocab_size) == (8192, 8, 128256)
    assert config.num_hidden_layers == 8
    # Llama-3-70B as a whole has 70.6 billion parameters.
    whole = model_config(parser.parse_args(["--layers", "80"]), "cuda")
    assert whole.parameters / 1e9 == pytest.approx(70.55, abs=0.01)
    other = parser.parse_args(["--shape", "llama-3-8b", "--hidden-size", "2048"])
    assert model_config(other, "cpu").hidden_size == 2048
    # 8 layers in bf16: a wrong partial sum in each of them would be far beyond this.
    assert tolerance(config, torch.bfloat16) == pytest.approx(0.064, abs=0.001)


def test_one_rank_has_nothing_to_compare(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["decode", "--ranks", "1", "--device", "cpu"]) == 1
    assert "2 ranks or more are needed; got 1" in capsys.readouterr().err
