"""config.json as it is found in the wild, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.tp_llama.config import LlamaConfig, RopeScaling
from scripts.tp_llama.errors import CheckpointError
from scripts.tp_llama.partition import Partition
from scripts.tp_llama.rope import cos_sin_table, inverse_frequencies
from tests.unit.tp_llama.tiny_checkpoint import TINY

# The fields that Llama-3.1-8B-Instruct publishes.
LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}


def test_llama_3_1() -> None:
    config = LlamaConfig.from_dict(LLAMA_3_1_8B)
    assert config.head_dim == 128
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert config.parameters == 8_030_261_248
    assert not config.qkv_bias


def test_what_other_members_of_the_family_leave_out_or_add() -> None:
    old = {k: v for k, v in TINY.items() if k not in ("num_key_value_heads", "head_dim")}
    assert LlamaConfig.from_dict(old).num_key_value_heads == 8
    assert LlamaConfig.from_dict(old).head_dim == 8
    qwen2 = LlamaConfig.from_dict({**TINY, "model_type": "qwen2", "use_sliding_window": False,
                                   "sliding_window": 16})  # fmt: skip
    assert (qwen2.qkv_bias, qwen2.output_bias) == (True, False)
    assert qwen2.max_position_embeddings == 128
    mistral = LlamaConfig.from_dict({**TINY, "model_type": "mistral", "sliding_window": 16})
    assert mistral.max_position_embeddings == 16  # attention is full here: beyond it differs
    biased = LlamaConfig.from_dict({**TINY, "attention_bias": True})
    assert (biased.qkv_bias, biased.output_bias) == (True, True)
    # transformers 5 writes one object for all of RoPE.
    new = {k: v for k, v in TINY.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}
    assert LlamaConfig.from_dict(new).rope_theta == 1e6
    assert LlamaConfig.from_dict(new).rope_scaling == RopeScaling("linear", 2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; accepted: llama, mistral, qwen2"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; accepted: silu"),
        ({"hidden_size": None}, "hidden_size must be a positive integer; got None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer; got 0"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads; got 8 and 3"),
        ({"head_dim": 7}, "head_dim must be even for RoPE; got 7"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn'; accepted: default, linear, llama3"),
        ({"rope_scaling": {"type": "linear"}}, "needs factor; factor missing"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor, high"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; accepted: 1.0"),
    ],
)
def test_a_field_that_is_not_accepted_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: .*{message}"):
        LlamaConfig.from_dict({**TINY, **change})


def test_the_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json: .* needs this file; No such file"):
        LlamaConfig.from_directory(tmp_path)
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: not a JSON file"):
        LlamaConfig.from_directory(tmp_path)
    path.write_text("[]")
    with pytest.raises(CheckpointError, match="a JSON object is expected; got a list"):
        LlamaConfig.from_directory(tmp_path)
    path.write_text(json.dumps(TINY))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 260]}))
    assert LlamaConfig.from_directory(tmp_path).eos_token_ids == (257, 260)


def test_llama3_frequencies_against_the_published_rule() -> None:
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    got = inverse_frequencies(128, 500000.0, scaling).tolist()
    plain = inverse_frequencies(128, 500000.0, RopeScaling()).tolist()
    kinds = set()
    for frequency, scaled in zip(plain, got, strict=True):
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4.0:
            kind, expected = "kept", frequency
        elif wavelength > 8192 / 1.0:
            kind, expected = "slowed", frequency / 8
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            kind, expected = "blended", (1 - smooth) * frequency / 8 + smooth * frequency
        kinds.add(kind)
        assert math.isclose(scaled, expected, rel_tol=1e-5)
    assert kinds == {"kept", "slowed", "blended"}


def test_cos_sin_table() -> None:
    config = LlamaConfig.from_dict({**TINY, "head_dim": 4, "rope_theta": 100.0})
    table = cos_sin_table(config, 3, torch.device("cpu"))
    angles = torch.tensor([[0.0, 0.0], [1.0, 0.1], [2.0, 0.2]])
    torch.testing.assert_close(table, torch.cat((angles.cos(), angles.sin()), dim=1))


@pytest.mark.parametrize(
    ("tp", "heads", "kv_heads", "firsts"),
    [
        (1, 8, 4, [0]),
        (2, 4, 2, [0, 2]),
        (4, 2, 1, [0, 1, 2, 3]),
        (8, 1, 1, [0, 0, 1, 1, 2, 2, 3, 3]),
    ],
)
def test_heads_of_a_rank(tp: int, heads: int, kv_heads: int, firsts: list[int]) -> None:
    config = LlamaConfig.from_dict(TINY)
    parts = [Partition.of(config, rank, tp) for rank in range(tp)]
    assert [part.first_kv_head for part in parts] == firsts
    assert {(part.heads, part.kv_heads) for part in parts} == {(heads, kv_heads)}
    share = config.num_attention_heads // config.num_key_value_heads
    for part in parts:  # each query head finds its KV head on its own rank
        for head in range(part.rank * heads, (part.rank + 1) * heads):
            assert 0 <= head // share - part.first_kv_head < kv_heads


@pytest.mark.parametrize(
    ("change", "tp", "message"),
    [
        ({}, 3, "tp 3 must divide num_attention_heads, which is 8 .* accepted: 1, 2, 4, 8"),
        ({}, 16, "tp 16 must divide num_attention_heads, which is 8"),
        ({"intermediate_size": 98}, 4, "tp 4 must divide intermediate_size, .* 98 .*: 1, 2"),
        ({"num_attention_heads": 12, "num_key_value_heads": 6}, 4, "num_key_value_heads .* 6 in"),
    ],
)
def test_a_size_that_does_not_divide(change: dict[str, Any], tp: int, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Partition.of(LlamaConfig.from_dict({**TINY, **change}), 0, tp)
