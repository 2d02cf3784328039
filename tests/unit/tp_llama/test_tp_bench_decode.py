"""The decode benchmark on two CPU ranks, and the check that it makes before it times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scripts import bench_decode
from scripts.bench_decode import DISPATCH, WITHOUT, check, model_config, tolerance
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
            *(sys.executable, "-m", "scripts.bench_decode", "--device", "cpu", "--explain"),
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
    report = json.loads((tmp_path / "r.json").read_text())
    assert [row["batch"] for row in report["rows"]] == [1, 3]
    assert report["facts"]["devices"] == ["CPU x86_64"] * 2 or os.uname().machine != "x86_64"
    for row in report["rows"]:
        assert row["chosen"]["gloo"][0] == "torch_distributed"
        assert row["chosen"][DISPATCH][0] == "cpu_shm"
        assert row["all_reduce_bytes"] == row["batch"] * 256 * 2
        assert set(row["us"]) == {"gloo", DISPATCH, WITHOUT}
        for at in row["us"].values():
            assert 0 < at["p10"] <= at["median"] <= at["p90"]
        line = f"| {row['batch']} | {row['us']['gloo']['median']:.1f} |"
        assert line in done.stdout
        assert line in (tmp_path / "r.md").read_text()


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
    options = bench_decode.parser().parse_args([])
    config = model_config(options, "cuda")
    assert (config.hidden_size, config.num_key_value_heads, config.vocab_size) == (8192, 8, 128256)
    assert config.num_hidden_layers == 8
    # Llama-3-70B as a whole has 70.6 billion parameters.
    whole = model_config(bench_decode.parser().parse_args(["--layers", "80"]), "cuda")
    assert whole.parameters / 1e9 == pytest.approx(70.55, abs=0.01)
    other = bench_decode.parser().parse_args(["--shape", "llama-3-8b", "--hidden-size", "2048"])
    assert model_config(other, "cpu").hidden_size == 2048
    # 8 layers in bf16: a wrong partial sum in each of them would be far beyond this.
    assert tolerance(config, torch.bfloat16) == pytest.approx(0.064, abs=0.001)


def test_one_rank_has_nothing_to_compare(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_decode.main(["--tp", "1", "--device", "cpu"]) == 1
    assert "2 ranks or more are needed; got 1" in capsys.readouterr().err
