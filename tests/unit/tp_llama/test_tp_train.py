"""The trainer: what a batch holds, and that a run can be stopped and goes on the same."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from scripts.tp_llama.train import Corpus, Run, rate_factor, source_files, train
from scripts.tp_llama.train_export import BOS, EOS

SOURCE = "def f(x):\n    return x\n\n\nclass A:\n    y = 'é'\n" * 40


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    (tmp_path / "a.py").write_text(SOURCE)
    (tmp_path / "b.py").write_text("")
    for skipped in ("test", "site-packages"):
        (tmp_path / skipped).mkdir()
        (tmp_path / skipped / "c.py").write_text("no")
    files = source_files(tmp_path)
    assert [path.name for path in files] == ["a.py", "b.py"]
    return Corpus(files)


def test_a_batch_starts_at_lines(corpus: Corpus) -> None:
    lines = {bytes(line, "utf-8") for line in SOURCE.split("\n")}
    rows = corpus.batch(64, 80, torch.Generator().manual_seed(0)).tolist()
    outer = 0
    for row in rows:
        assert len(row) == 81
        assert row[0] == BOS
        first = bytes(t for t in row[1:] if t < 256).split(b"\n")[0]
        assert first in lines
        outer += not first.startswith(b" ") and first != b""
    assert outer >= 32
    assert corpus.tokens.tolist().count(EOS) == 2


def test_the_rate_warms_up_holds_and_falls() -> None:
    assert rate_factor(0.0, 0) == pytest.approx(0.01)
    assert rate_factor(0.2, 500) == 1.0
    assert rate_factor(0.7, 500) == pytest.approx(0.5)
    assert rate_factor(1.0, 500) == 0.0


def test_a_stopped_run_goes_on_the_same(tmp_path: Path, corpus: Corpus) -> None:
    options = argparse.Namespace(
        state=str(tmp_path / "state.pt"), steps=2, minutes=60.0, batch=2, rate=1e-3, seed=1,
        report_every=1, compile=False,
    )  # fmt: skip
    held_out = [corpus.batch(2, 32, torch.Generator().manual_seed(0))]
    straight = Run(options)
    train(straight, corpus, held_out)
    options.steps = 1
    stopped = Run(options)
    train(stopped, corpus, held_out)
    options.steps = 2
    resumed = Run(options)
    resumed.resume()
    train(resumed, corpus, held_out)
    assert [point["step"] for point in resumed.curve] == [1, 2]
    for name, weight in straight.model.state_dict().items():
        # The rate of the first step depends on the planned length, not here: both are warm-up.
        torch.testing.assert_close(resumed.model.state_dict()[name], weight, rtol=0, atol=1e-6)
