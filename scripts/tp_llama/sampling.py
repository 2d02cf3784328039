"""Choose the next token of each sequence from its logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import JobError


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy. top_p keeps the most likely tokens that add up to it."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0.0:
            raise JobError(f"the temperature must be 0 (greedy) or more; got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise JobError(f"top-p must be above 0 and at most 1; got {self.top_p}")


class Sampler:
    """``pick(logits [S, vocab]) -> int64 [S]``, seeded; used on the rank that decides."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.sampling = sampling
        self._random = torch.Generator(device).manual_seed(sampling.seed)

    def pick(self, logits: Tensor) -> Tensor:
        if self.sampling.temperature == 0.0:
            return logits.argmax(dim=-1)
        chances = (logits.float() / self.sampling.temperature).softmax(dim=-1)
        if self.sampling.top_p < 1.0:
            chances = nucleus(chances, self.sampling.top_p)
        return torch.multinomial(chances, 1, generator=self._random).squeeze(-1)


def nucleus(chances: Tensor, top_p: float) -> Tensor:
    """Zero all but the smallest set of likeliest tokens whose sum reaches ``top_p``; same shape.

    arXiv:1904.09751. At least one token stays. The result is not normalised.
    """
    ordered, order = chances.sort(dim=-1, descending=True)
    sum_before = ordered.cumsum(dim=-1) - ordered
    kept = ordered.masked_fill(sum_before >= top_p, 0.0)
    return torch.zeros_like(chances).scatter(-1, order, kept)
