"""The four layers that are split over ranks, after Megatron-LM (arXiv:1909.08053).

A column-parallel layer holds rows of the weight (columns of the product) and needs no
communication; the row-parallel layer after it holds the matching columns, and its partial sums
are added over the ranks. Shapes: ``T`` tokens, ``hidden`` whole, everything else this rank's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .timed_group import TimedGroup


@dataclass(frozen=True)
class ColumnParallelLinear:
    """``[T, hidden] -> [T, out of this rank]``."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class RowParallelLinear:
    """``[T, in of this rank] -> [T, hidden]``, the sum over all ranks, the same on each."""

    weight: Tensor
    bias: Tensor | None
    tp: TimedGroup

    def __call__(self, x: Tensor) -> Tensor:
        y = self.tp.all_reduce_(F.linear(x, self.weight))
        # After the sum: the bias is whole on every rank and must be added once.
        return y if self.bias is None else y.add_(self.bias)


@dataclass(frozen=True)
class VocabParallelEmbedding:
    """``[T] int64 token ids -> [T, hidden]``; a rank looks up the ids that it holds."""

    weight: Tensor
    tp: TimedGroup

    def __call__(self, tokens: Tensor) -> Tensor:
        rows = self.weight.size(0)
        local = tokens - self.tp.rank_in_group * rows
        elsewhere = (local < 0) | (local >= rows)
        found = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        # One rank's row plus zeros: the sum is exact in every dtype.
        return self.tp.all_reduce_(found.masked_fill_(elsewhere[:, None], 0.0))


@dataclass(frozen=True)
class VocabParallelLogits:
    """``[T, hidden] -> [T, vocabulary rows of this rank]``, fp32; gather() makes them whole."""

    weight: Tensor
    vocab_size: int
    tp: TimedGroup

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight).float()

    def gather(self, logits: Tensor) -> Tensor | None:
        """``[T, vocab_size]`` on rank 0, None on the others. Collective."""
        whole = self.tp.gather(logits, dst=0, dim=-1)
        # The rows beyond the vocabulary are padding of the last ranks.
        return None if whole is None else whole[:, : self.vocab_size]
