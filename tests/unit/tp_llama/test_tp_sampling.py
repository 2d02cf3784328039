"""Greedy, temperature, top-p."""

from __future__ import annotations

import pytest
import torch

from scripts.tp_llama.errors import JobError
from scripts.tp_llama.sampling import Sampler, Sampling, nucleus

CPU = torch.device("cpu")


def test_greedy_takes_the_largest() -> None:
    logits = torch.tensor([[0.1, 3.0, 2.9], [5.0, -1.0, 4.0]])
    assert Sampler(Sampling(), CPU).pick(logits).tolist() == [1, 0]


def test_nucleus_by_hand() -> None:
    chances = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
    assert nucleus(chances, 0.5).tolist() == [[0, 0.5, 0, 0]]
    assert nucleus(chances, 0.6).tolist() == [[0, 0.5, 0, 0.25]]
    assert nucleus(chances, 1e-9).count_nonzero() == 1
    assert torch.equal(nucleus(chances, 1.0), chances)


def test_frequencies_follow_the_temperature() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(40000, 3)
    for temperature in (0.5, 1.0, 2.0):
        tokens = Sampler(Sampling(temperature, seed=3), CPU).pick(logits)
        got = tokens.bincount(minlength=3) / len(tokens)
        expected = (logits[0] / temperature).softmax(-1)
        # 5 standard deviations of a share of 40000 draws: at most 5 * sqrt(0.25 / 40000).
        torch.testing.assert_close(got, expected, atol=0.0125, rtol=0)


def test_tokens_outside_the_nucleus_never_come() -> None:
    logits = torch.tensor([3.0, 2.0, 0.0, -1.0]).expand(20000, 4)
    tokens = Sampler(Sampling(1.0, top_p=0.8), CPU).pick(logits)
    assert set(tokens.tolist()) == {0, 1}


def test_the_seed_decides() -> None:
    logits = torch.zeros(64, 100)

    def draw(seed: int) -> list[int]:
        return Sampler(Sampling(1.0, seed=seed), CPU).pick(logits).tolist()

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize("top_p", [0.0, -0.1, 1.1])
def test_what_is_refused(top_p: float) -> None:
    with pytest.raises(JobError, match="top-p must be above 0 and at most 1"):
        Sampling(top_p=top_p)
    with pytest.raises(JobError, match="temperature must be 0"):
        Sampling(temperature=-1.0)
