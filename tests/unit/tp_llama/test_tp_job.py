"""The job as a user starts it, on the checkpoint that ships with the repository."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from scripts.tp_llama import options as command_line
from scripts.tp_llama import verify as verification
from scripts.tp_llama.errors import JobError
from scripts.tp_llama.generate import Generator, Limits
from scripts.tp_llama.loader import load
from scripts.tp_llama.model import LlamaModel
from scripts.tp_llama.options import DEFAULT_PROMPT, SHIPPED, parser
from scripts.tp_llama.timed_group import TimedGroup
from scripts.tp_llama.tokenizer import load_tokenizer
from scripts.tp_llama.train_model import DenseLlama, Shape
from tests.unit.tp_llama.thread_ranks import ThreadGroup, on_ranks

ROOT = Path(__file__).parents[3]
PHASE = r"{}: +\d+ tokens in [\d.]+ s, [\d.]+ tokens/s, [\d.]+% of it in communication"


def job(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "scripts.tp_llama", "--device", "cpu", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def shipped_dense_model() -> DenseLlama:
    dense = DenseLlama(Shape()).eval()
    weights = load_file(SHIPPED / "model.safetensors")
    dense.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return dense


def test_one_command_writes_python_on_two_ranks() -> None:
    done = job("--tp", "2", "--max-new-tokens", "40")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(DEFAULT_PROMPT)
    assert len(done.stdout) > len(DEFAULT_PROMPT)
    assert "tp 2 on cpu, float32" in done.stderr
    for phase in ("prefill", "decode"):
        assert re.search(PHASE.format(phase), done.stderr), done.stderr


def test_tp_1_2_and_4_give_the_same_greedy_tokens() -> None:
    done = job("--verify", "--max-new-tokens", "32")
    assert done.returncode == 0, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last == "verify: SAME: 128 greedy tokens of 4 prompts are equal at tp 1, 2, 4"


def test_bad_options_end_with_one_sentence(tmp_path: Path) -> None:
    done = job("--prompt-file", str(tmp_path / "none"), "--tp", "1")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: --prompt-file {tmp_path / 'none'}: cannot be read")
    assert done.stderr.count("\n") == 1


def test_the_job_agrees_with_the_model_that_was_trained() -> None:
    """The trainer's dense decoder and the split one share the checkpoint and no code."""
    dense = shipped_dense_model()
    text = "class Reader:\n    def __init__(self, path):\n        "
    prompt = load_tokenizer(SHIPPED).encode(text)
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(48):
            tokens.append(int(dense(torch.tensor([tokens]))[0, -1].argmax()))

    def generate(group: ThreadGroup) -> list[list[int]]:
        tp = TimedGroup(group)
        config, part, weights = load(SHIPPED, tp)
        generator = Generator(LlamaModel(config, part, weights, tp, 512), torch.float32)
        return generator([prompt], Limits(48)).tokens

    for world_size in (1, 2, 4):
        assert on_ranks(world_size, generate)[0] == [tokens[len(prompt) :]]


def test_the_shipped_model_has_learnt_python() -> None:
    """Its loss on code that is not in the standard library: 5.5 nats a byte is a guess."""
    dense = shipped_dense_model()
    text = Path(verification.__file__).read_text()[:500]
    tokens = torch.tensor([load_tokenizer(SHIPPED).encode(text)])
    with torch.inference_mode():
        loss = F.cross_entropy(dense(tokens[:, :-1])[0], tokens[0, 1:])
    assert loss < 2.0


def test_the_shipped_files_are_small() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 6.2e6


def run_verify(
    monkeypatch: pytest.MonkeyPatch, results: dict[int, list[list[int]]], *arguments: str
) -> int:
    monkeypatch.setattr(verification, "tokens_at", lambda size, options, texts: results[size])
    return verification.verify(parser().parse_args(["--verify", "--device", "cpu", *arguments]))


def test_verify_says_where_runs_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_verify(monkeypatch, {1: [[5, 6]], 2: [[5, 6]], 4: [[5, 7]]})
    assert code == 1
    assert capsys.readouterr().err == (
        "verify: tp 4 differs from tp 1: prompt 0: new token 1 is 7 where 6 is expected\n"
        "verify: DIFFERENT\n"
    )
    with pytest.raises(JobError, match=r"greedy tokens; got --temperature 0.5"):
        run_verify(monkeypatch, {}, "--temperature", "0.5")


def test_verify_with_one_possible_size(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verification, "possible_sizes", lambda options: [1])
    assert run_verify(monkeypatch, {}) == 2
    assert "NOTHING TO COMPARE" in capsys.readouterr().err


def test_sizes_that_the_machine_or_the_checkpoint_does_not_permit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    options = argparse.Namespace(device="auto", model=SHIPPED)
    assert verification.possible_sizes(options) == [1, 2]
    assert "tp 4: left out; --tp 4 needs 4 GPUs; this machine has 2" in capsys.readouterr().err
    assert command_line.world_size(None, "cuda") == 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert command_line.world_size(None, "cuda") == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(JobError, match="torch sees no GPU on this machine; accepted: cpu, auto"):
        command_line.device_kind("cuda")
    assert command_line.world_size(None, command_line.device_kind("auto")) == 2
    with pytest.raises(JobError, match="--tp must be 1 or more; got 0"):
        command_line.world_size(0, "cpu")
