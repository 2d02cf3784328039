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


LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


# What AutoConfig of transformers 5.24 makes of the same fields.
@pytest.mark.parametrize(
    ("change", "theta", "scaling"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, RopeScaling()),
        ({"rope_parameters": {"rope_type": "default"}}, 10000.0, RopeScaling()),
        ({"rope_parameters": {"rope_theta": 5e5}}, 5e5, RopeScaling()),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 7}}, 7.0, RopeScaling()),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 10000.0, RopeScaling("linear", 2.0)),
        ({"rope_scaling": {**LINEAR, "rope_theta": 7.0}}, 7.0, RopeScaling("linear", 2.0)),
        ({"rope_scaling": {**LINEAR, "factor": 0.5}}, 10000.0, RopeScaling("linear", 0.5)),
        ({"rope_scaling": {**LINEAR, "type": "llama3"}}, 10000.0, RopeScaling("linear", 2.0)),
        ({"rope_scaling": {}, "rope_parameters": LINEAR}, 10000.0, RopeScaling("linear", 2.0)),
        ({"rope_scaling": None, "rope_parameters": LINEAR}, 10000.0, RopeScaling("linear", 2.0)),
        # Beside a rope_scaling, rope_parameters is not read, its rope_theta neither.
        (
            {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5}},
            10000.0,
            RopeScaling("linear", 2.0),
        ),
        ({"rope_scaling": LLAMA3}, 10000.0, RopeScaling("llama3", 8.0, 1.0, 4.0, 128)),
    ],
)
def test_rope_as_transformers_reads_it(
    change: dict[str, Any], theta: float, scaling: RopeScaling
) -> None:
    config = LlamaConfig.from_dict({**TINY, **change})
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("model_type", "change", "kv_heads", "context"),
    [
        ("llama", {"sliding_window": 16}, 8, 2048),  # a window is no field of this type
        ("mistral", {"num_attention_heads": 16}, 8, 4096),
        ("mistral", {"sliding_window": None}, 8, 131072),
        ("mistral", {"num_key_value_heads": None, "sliding_window": 0}, 8, 131072),
        ("qwen2", {"num_attention_heads": 32}, 32, 32768),
        ("qwen2", {"num_key_value_heads": 4, "sliding_window": 16}, 4, 32768),
        ("qwen2", {"num_key_value_heads": 4, "use_sliding_window": True}, 4, 4096),
    ],
)
def test_what_a_type_takes_for_a_field_that_is_not_there(
    model_type: str, change: dict[str, Any], kv_heads: int, context: int
) -> None:
    left = ("num_key_value_heads", "max_position_embeddings")
    fields = {k: v for k, v in TINY.items() if k not in left}
    config = LlamaConfig.from_dict({**fields, "model_type": model_type, **change})
    assert (config.num_key_value_heads, config.max_position_embeddings) == (kv_heads, context)


STRANGE = ["32", True, 8.5, None, -1, 0, [8], {"a": 1}, 10**30, 10**400, math.nan, math.inf, [[]]]
INTEGERS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
ACCEPTED: dict[str, list[Any]] = {
    **{name: [] for name in INTEGERS},
    "num_key_value_heads": [None],
    "head_dim": [None],
    "sliding_window": [None, 0],
    "rms_norm_eps": [8.5, 0, 10**30],
    "rope_theta": [8.5, 10**30],
    "bos_token_id": [None, -1, 0, 10**30, 10**400],
    "eos_token_id": [None, -1, 0, [8], 10**30, 10**400],
    **{name: [True] for name in ("tie_word_embeddings", "attention_bias", "mlp_bias")},
    "hidden_act": [],
    "model_type": [],
    "rope_scaling": [None, {"a": 1}],
    "rope_parameters": [None, {"a": 1}],
    "partial_rotary_factor": [None],
    "factor": [8.5, 10**30],
    "low_freq_factor": [],  # those that are numbers are not below high_freq_factor
    "high_freq_factor": [8.5, 10**30],
    "original_max_position_embeddings": [],
    "rope_type": [],
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_every_field_of_every_strange_kind(name: str) -> None:
    """Taken, or one sentence that names file and field; never anything else."""
    base = {**TINY, "model_type": "mistral"} if name == "sliding_window" else TINY
    for value in STRANGE:
        if name in LLAMA3 or name == "original_max_position_embeddings":
            fields = {**base, "rope_scaling": {**LLAMA3, name: value}}
        else:
            fields = {**base, name: value}
        # What json reads for NaN: equal to nothing, so found by its own identity.
        if any(value is one or (value == one and type(value) is type(one)) for one in
               ACCEPTED[name]):  # fmt: skip
            LlamaConfig.from_dict(fields)
            continue
        with pytest.raises(CheckpointError) as caught:
            LlamaConfig.from_dict(fields, "some/config.json")
        message = str(caught.value)
        assert message.startswith("some/config.json: ") and name in message, (value, message)
        assert "\n" not in message and len(message) < 250, message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": "32"}, "head_dim must be a positive integer or null; got '32'"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers must be a positive integer up to 65536"),
        (
            {"rope_scaling": {**LINEAR, "factor": 0}},
            "rope_scaling's factor must be a finite number",
        ),
        (
            {"rope_scaling": {**LLAMA3, "low_freq_factor": 4}},
            "larger than low_freq_factor; got 4 a",
        ),
        (
            {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": {}}},
            r"rope_parameters differs by layer type \(full_attention, sliding_attention\); one",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters's partial_rotary"),
        ({"head_dim": None, "num_attention_heads": 7}, "a multiple of num_attention_heads where"),
        ({"eos_token_id": [1, "2"]}, "must be an integer, a list of integers or null"),
    ],
)
def test_a_sentence_for_it(change: dict[str, Any], message: str) -> None:
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
    path.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"config.json: not a JSON file"):
        LlamaConfig.from_directory(tmp_path)
    path.write_text(json.dumps(TINY))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "end"}')
    with pytest.raises(CheckpointError, match=r"generation_config.json: eos_token_id must be"):
        LlamaConfig.from_directory(tmp_path)
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
