"""Prefill a batch of prompts, then decode it token by token."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

import torch

from .decode_step import DecodeStep
from .errors import JobError
from .kv_cache import BlockAllocator, BlockTables, PagedKVCache, Sequence
from .model import DecodeInputs, LlamaModel
from .sampling import Sampler, Sampling


@dataclass
class Phase:
    """How long one phase took on this rank: tokens, seconds, and seconds in collectives.

    With ``graph`` the collectives inside the CUDA graph are not in ``communication_seconds``.
    """

    tokens: int = 0
    seconds: float = 0.0
    communication_seconds: float = 0.0
    graph: bool = False

    def summary(self) -> str:
        if self.tokens == 0:
            return "nothing to do"
        share = f"{self.communication_seconds / self.seconds:.1%} of it in"
        return (
            f"{self.tokens} tokens in {self.seconds:.3f} s, {self.tokens / self.seconds:.1f} "
            f"tokens/s, {share} communication"
            + (" outside the CUDA graph (inside it is not timed)" if self.graph else "")
        )


@dataclass
class Generation:
    """New tokens of each prompt (an end-of-text token included), and the times.

    ``capture_seconds`` is None where decode ran without a CUDA graph.
    """

    tokens: list[list[int]]
    prefill: Phase = field(default_factory=Phase)
    capture_seconds: float | None = None
    decode: Phase = field(default_factory=Phase)


@dataclass(frozen=True)
class Limits:
    """When generation ends: after so many new tokens, or at one of these tokens."""

    max_new_tokens: int
    eos_token_ids: tuple[int, ...] = ()


# (index of the prompt, new token); called as the tokens come
OnToken = Callable[[int, int], None]


def check_lengths(prompts: list[list[int]], limits: Limits, context: int) -> None:
    """Raises JobError where the prompts and what shall follow do not fit the model's context."""
    if limits.max_new_tokens < 1:
        raise JobError(f"max-new-tokens must be 1 or more; got {limits.max_new_tokens}")
    if not prompts:
        raise JobError("at least one prompt is needed")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise JobError(f"prompt {index} has no tokens; at least one is needed")
        if len(prompt) + limits.max_new_tokens > context:
            raise JobError(
                f"prompt {index} has {len(prompt)} tokens and {limits.max_new_tokens} new ones are "
                f"asked for; the model's context is {context}"
            )


class DecodeBuffers:
    """Owns the fixed tensors of a decode step and fills them from the host's bookkeeping.

    Until then they describe sequences that have ended: a step may run and touches no cache.
    """

    def __init__(self, sequences: int, blocks: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.inputs = DecodeInputs(
            tokens=zeros(sequences),
            positions=zeros(sequences),
            slots=zeros(sequences).fill_(-1),
            block_tables=zeros(sequences, blocks, dtype=torch.int32),
            seq_lens=zeros(sequences, dtype=torch.int32),
        )
        self._host_tables = torch.zeros(sequences, blocks, dtype=torch.int32)

    def fill(
        self, tokens: torch.Tensor, sequences: list[Sequence], slots: list[int], ended: list[bool]
    ) -> None:
        """``slots`` and ``ended`` per sequence; one that has ended is left out of the step."""
        lengths = [0 if e else s.length for s, e in zip(sequences, ended, strict=True)]
        for row, sequence in enumerate(sequences):
            self._host_tables[row, : len(sequence.blocks)] = torch.tensor(
                sequence.blocks, dtype=torch.int32
            )
        self.inputs.tokens.copy_(tokens)
        self.inputs.positions.copy_(torch.tensor([max(0, n - 1) for n in lengths]))
        self.inputs.slots.copy_(torch.tensor(slots))
        self.inputs.seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        self.inputs.block_tables.copy_(self._host_tables)


class Generator:
    """Runs one batch on every rank of the model's group; all ranks return the same tokens.

    Rank 0 chooses the tokens and broadcasts them, so the ranks cannot drift apart. With ``graph``,
    on a GPU, the decode step is captured once for the batch and replayed; choosing stays outside.
    """

    def __init__(
        self,
        model: LlamaModel,
        dtype: torch.dtype,
        block_size: int = 16,
        kv_cache_dtype: str = "auto",
        graph: bool = True,
    ) -> None:
        if block_size not in (8, 16, 32):
            raise JobError(f"the block size must be 8, 16 or 32; got {block_size}")
        self.model, self.tp = model, model.tp
        self.dtype, self.block_size, self.kv_cache_dtype = dtype, block_size, kv_cache_dtype
        self.device = model.tp.device
        self.graph = graph and self.device.type == "cuda"

    @torch.inference_mode()
    def __call__(
        self,
        prompts: list[list[int]],
        limits: Limits,
        sampling: Sampling | None = None,
        on_token: OnToken = lambda index, token: None,
    ) -> Generation:
        """Collective. ``prompts`` are token ids and must be the same on every rank."""
        check_lengths(prompts, limits, self.model.config.max_position_embeddings)
        batch = _Batch(self, prompts, limits, Sampler(sampling or Sampling(), self.device))
        self.tp.take_seconds()

        began = time.perf_counter()
        tokens = batch.prefill(prompts)
        result = Generation([[] for _ in prompts])
        result.prefill = self._phase(sum(map(len, prompts)), began)

        with closing(batch.step):
            if self.graph and limits.max_new_tokens > 1:
                began = time.perf_counter()
                batch.step.capture()
                result.capture_seconds = self._phase(0, began).seconds

            began, decoded = time.perf_counter(), 0
            while batch.record(tokens, result.tokens, on_token):
                decoded += len(batch.ended) - sum(batch.ended)
                tokens = batch.decode(tokens)
            result.decode = self._phase(decoded, began, batch.step.captured)
        return result

    def _phase(self, tokens: int, began: float, graph: bool = False) -> Phase:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return Phase(tokens, time.perf_counter() - began, self.tp.take_seconds(), graph)


class _Batch:
    """The state of one call of Generator."""

    def __init__(
        self, owner: Generator, prompts: list[list[int]], limits: Limits, sampler: Sampler
    ) -> None:
        self.model, self.tp, self.device = owner.model, owner.tp, owner.device
        self.limits, self.sampler = limits, sampler
        config, size = owner.model.config, owner.block_size
        # The last new token is never attended to, so it needs no slot.
        blocks = [-(-(len(p) + limits.max_new_tokens - 1) // size) for p in prompts]
        self.cache = PagedKVCache(
            config.num_hidden_layers,
            sum(blocks),
            size,
            owner.model.part.kv_heads,
            config.head_dim,
            owner.dtype,
            self.device,
            owner.kv_cache_dtype,
        )
        self.tables = BlockTables(BlockAllocator(sum(blocks)), size)
        self.sequences = [Sequence() for _ in prompts]
        self.ended = [False] * len(prompts)
        self.buffers = DecodeBuffers(len(prompts), max(blocks), self.device)
        self.step = DecodeStep(owner.model, self.buffers.inputs, self.cache)

    def prefill(self, prompts: list[list[int]]) -> torch.Tensor:
        """The first new token of each prompt, int64 ``[S]``."""
        slots: list[int] = []
        for sequence, prompt in zip(self.sequences, prompts, strict=True):
            slots += self.tables.append(sequence, len(prompt))
        lengths = [len(prompt) for prompt in prompts]
        logits = self.model.prefill(
            torch.tensor([t for prompt in prompts for t in prompt], device=self.device),
            torch.cat([torch.arange(n, device=self.device) for n in lengths]),
            torch.tensor(slots, device=self.device),
            lengths,
            self.cache,
        )
        return self._choose(logits)

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """The token after ``tokens`` for each sequence, int64 ``[S]``."""
        slots = [
            -1 if ended else self.tables.append(sequence, 1)[0]
            for sequence, ended in zip(self.sequences, self.ended, strict=True)
        ]
        self.buffers.fill(tokens, self.sequences, slots, self.ended)
        return self._choose(self.step())

    def record(self, tokens: torch.Tensor, into: list[list[int]], on_token: OnToken) -> bool:
        """Note the new tokens of the live sequences; False when all have ended."""
        for index, token in enumerate(tokens.tolist()):
            if self.ended[index]:
                continue
            into[index].append(token)
            on_token(index, token)
            done = len(into[index]) == self.limits.max_new_tokens
            if done or token in self.limits.eos_token_ids:
                self.ended[index] = True
                self.tables.release(self.sequences[index])
        return not all(self.ended)

    def _choose(self, local_logits: torch.Tensor) -> torch.Tensor:
        logits = self.model.logits.gather(local_logits)
        if logits is None:
            tokens = torch.empty(local_logits.size(0), dtype=torch.int64, device=self.device)
        else:
            tokens = self.sampler.pick(logits)
        return self.tp.broadcast(tokens, src=0)
