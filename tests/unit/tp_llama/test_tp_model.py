"""The decoder against a dense one, at every way of splitting it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.tp_llama.config import LlamaConfig
from scripts.tp_llama.errors import JobError
from scripts.tp_llama.generate import Generator, Limits
from scripts.tp_llama.kv_cache import BlockAllocator, BlockTables, PagedKVCache, Sequence
from scripts.tp_llama.loader import load
from scripts.tp_llama.model import DecodeInputs, LlamaModel
from scripts.tp_llama.rope import inverse_frequencies
from scripts.tp_llama.timed_group import TimedGroup
from tests.unit.tp_llama.thread_ranks import ThreadGroup, on_ranks
from tests.unit.tp_llama.tiny_checkpoint import TINY, DenseReference, write_checkpoint

PROMPTS = [[256, 5, 17, 200], [256], list(range(30, 70)), [256, 9, 9]]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "one_kv_head": {"num_key_value_heads": 1},
    "llama3_rope": {"rope_scaling": LLAMA3},
    "linear_rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
}


def reference(directory: Path) -> DenseReference:
    config = LlamaConfig.from_directory(directory)
    return DenseReference(
        directory, inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    )


def model_on(group: ThreadGroup, directory: Path, dtype: torch.dtype | None = None) -> LlamaModel:
    tp = TimedGroup(group)
    config, part, weights = load(directory, tp, dtype)
    return LlamaModel(config, part, weights, tp, config.max_position_embeddings)


def first_logits(group: ThreadGroup, directory: Path) -> torch.Tensor | None:
    """Logits after each of PROMPTS, on rank 0."""
    model = model_on(group, directory)
    config = model.config
    cache = PagedKVCache(
        config.num_hidden_layers, 8, 16, model.part.kv_heads, config.head_dim,
        torch.float32, torch.device("cpu"),
    )  # fmt: skip
    tables = BlockTables(BlockAllocator(8), 16)
    slots = [slot for prompt in PROMPTS for slot in tables.append(Sequence(), len(prompt))]
    lengths = [len(prompt) for prompt in PROMPTS]
    with torch.inference_mode():
        local = model.prefill(
            torch.tensor([token for prompt in PROMPTS for token in prompt]),
            torch.cat([torch.arange(n) for n in lengths]),
            torch.tensor(slots),
            lengths,
            cache,
        )
        return model.logits.gather(local)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_prefill_logits_equal_the_dense_decoder(
    tmp_path: Path, variant: str, world_size: int
) -> None:
    write_checkpoint(tmp_path, **VARIANTS[variant])
    dense = reference(tmp_path)
    expected = torch.stack([dense.logits(prompt)[-1] for prompt in PROMPTS])
    results = on_ranks(world_size, lambda group: first_logits(group, tmp_path))
    assert results[0] is not None
    assert results[0].shape == (len(PROMPTS), TINY["vocab_size"])
    assert all(result is None for result in results[1:])
    # fp32 against fp64: two layers of sums over at most 256 products.
    torch.testing.assert_close(results[0], expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_generation_equals_the_dense_decoder(tmp_path: Path, variant: str, world_size: int) -> None:
    write_checkpoint(tmp_path, **VARIANTS[variant])
    dense = reference(tmp_path)
    expected = [dense.greedy(prompt, 40) for prompt in PROMPTS]
    seen: list[tuple[int, int]] = []

    def work(group: ThreadGroup) -> list[list[int]]:
        generator = Generator(model_on(group, tmp_path), torch.float32)
        leads = group.rank_in_group == 0
        result = generator(
            PROMPTS,
            Limits(40, (257,)),
            on_token=(lambda i, t: seen.append((i, t))) if leads else lambda i, t: None,
        )
        return result.tokens

    for generated in on_ranks(world_size, work):
        assert generated == expected
    for index, tokens in enumerate(expected):
        assert [token for i, token in seen if i == index] == tokens


@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_the_block_size_does_not_change_the_tokens(tmp_path: Path, block_size: int) -> None:
    write_checkpoint(tmp_path)
    expected = [reference(tmp_path).greedy(prompt, 20) for prompt in PROMPTS]

    def work(group: ThreadGroup) -> list[list[int]]:
        generator = Generator(model_on(group, tmp_path), torch.float32, block_size)
        return generator(PROMPTS, Limits(20)).tokens

    # No end-of-text token is given here, so each has all 20; the reference stops at it.
    for got, tokens in zip(on_ranks(1, work)[0], expected, strict=True):
        assert len(got) == 20
        assert got[: len(tokens)] == tokens


def test_a_sequence_that_ends_early_leaves_the_others_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    alone = reference(tmp_path).greedy(PROMPTS[0], 20)
    eos = alone[4]  # the first prompt ends here; the others go on as far as they do alone
    assert eos not in alone[:4]

    def work(group: ThreadGroup) -> list[list[int]]:
        return Generator(model_on(group, tmp_path), torch.float32)(
            PROMPTS, Limits(20, (eos,))
        ).tokens

    results = on_ranks(2, work)[0]
    assert results[0] == alone[:5]
    for prompt, got in zip(PROMPTS, results, strict=True):
        whole = reference(tmp_path).greedy(prompt, 20)
        end = whole.index(eos) + 1 if eos in whole else len(whole)
        assert got[:end] == whole[: len(got)]


def test_the_counts_and_times_are_those_of_the_work(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)

    def work(group: ThreadGroup) -> Any:
        return Generator(model_on(group, tmp_path), torch.float32)(PROMPTS, Limits(6))

    result = on_ranks(2, work)[1]
    assert result.prefill.tokens == sum(map(len, PROMPTS))
    assert result.decode.tokens == 5 * len(PROMPTS)  # the first of six comes from the prefill
    for phase in (result.prefill, result.decode):
        assert 0 < phase.communication_seconds < phase.seconds


def test_fp8_cache_stays_near_the_exact_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    prompt = list(range(40, 90))

    def work(group: ThreadGroup) -> list[torch.Tensor]:
        model = model_on(group, tmp_path)
        return [decode_logits(model, prompt, kind) for kind in ("auto", "fp8")]

    exact, quantized = on_ranks(1, work)[0]
    dense = reference(tmp_path).logits(prompt)[-1]
    torch.testing.assert_close(exact[0], dense, rtol=2e-4, atol=2e-4)
    # e4m3 has 3 mantissa bits: keys and values are off by up to 1/16, at random.
    error = (quantized[0] - dense).norm() / dense.norm()
    assert 1e-4 < error < 1 / 16


@torch.inference_mode()
def decode_logits(model: LlamaModel, prompt: list[int], kv_cache_dtype: str) -> torch.Tensor:
    """Prefill all but the last token, then decode it."""
    config = model.config
    cache = PagedKVCache(
        config.num_hidden_layers, 4, 16, model.part.kv_heads, config.head_dim,
        torch.float32, torch.device("cpu"), kv_cache_dtype,
    )  # fmt: skip
    tables, sequence = BlockTables(BlockAllocator(4), 16), Sequence()
    n = len(prompt) - 1
    slots = torch.tensor(tables.append(sequence, n))
    model.prefill(torch.tensor(prompt[:-1]), torch.arange(n), slots, [n], cache)
    slots = torch.tensor(tables.append(sequence, 1))
    inputs = DecodeInputs(
        tokens=torch.tensor(prompt[-1:]),
        positions=torch.tensor([n]),
        slots=slots,
        block_tables=torch.tensor([sequence.blocks], dtype=torch.int32),
        seq_lens=torch.tensor([n + 1], dtype=torch.int32),
    )
    logits = model.logits.gather(model.decode(inputs, cache))
    assert logits is not None
    return logits


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    generator = Generator(on_ranks(1, lambda g: model_on(g, tmp_path))[0], torch.float32)
    with pytest.raises(JobError, match=r"prompt 1 has 100 tokens .* 29 .* context is 128"):
        generator([[1], [1] * 100], Limits(29))
    with pytest.raises(JobError, match="prompt 0 has no tokens"):
        generator([[]], Limits(1))
    with pytest.raises(JobError, match="at least one prompt"):
        generator([], Limits(1))
    with pytest.raises(JobError, match="max-new-tokens must be 1 or more; got 0"):
        generator([[1]], Limits(0))
    with pytest.raises(JobError, match="block size must be 8, 16 or 32; got 7"):
        Generator(generator.model, torch.float32, 7)
