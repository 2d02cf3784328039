"""config.json of a Hugging Face directory -> the numbers that this decoder needs.

Fields: huggingface.co/docs/transformers, LlamaConfig (also MistralConfig and Qwen2Config, which
describe the same decoder with other biases or a sliding window).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config_fields import Fields
from .errors import CheckpointError

#: model_type -> what transformers takes for a field that is not there.
DEFAULTS: dict[str, dict[str, int | None]] = {
    "llama": {"max_position_embeddings": 2048, "num_key_value_heads": None},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
}
MODEL_TYPES = tuple(DEFAULTS)
ROPE_TYPES = ("default", "linear", "llama3")
MOST_LAYERS = 65536
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are stretched. ``linear`` uses the factor alone."""

    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """The decoder's numbers, checked. Token ids are ints; ``bos_token_id`` may be None."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_directory(cls, directory: Path) -> LlamaConfig:
        """Read config.json, and generation_config.json for its end-of-text tokens if it exists.

        Raises CheckpointError for a missing or unreadable file, a model that is not of this
        family, or a field that contradicts another.
        """
        path = directory / "config.json"
        config = cls.from_dict(_read_json(path), str(path))
        generation = directory / "generation_config.json"
        if generation.is_file():
            tokens = Fields(_read_json(generation), str(generation)).token_ids("eos_token_id")
            more = tuple(t for t in tokens if t not in config.eos_token_ids)
            config = cls(**{**config.__dict__, "eos_token_ids": config.eos_token_ids + more})
        return config

    @classmethod
    def from_dict(cls, fields: dict[str, Any], source: str = "config.json") -> LlamaConfig:
        given = Fields(fields, source)
        model_type = given.choice("model_type", "llama", MODEL_TYPES)
        given.choice("hidden_act", "silu", ("silu",))
        defaults = DEFAULTS[model_type]
        numbers = {name: given.count(name) for name in _REQUIRED}
        numbers["num_hidden_layers"] = given.count("num_hidden_layers", most=MOST_LAYERS)
        heads, hidden = numbers["num_attention_heads"], numbers["hidden_size"]
        if fields.get("head_dim") is None and hidden % heads:
            raise CheckpointError(
                f"{source}: hidden_size must be a multiple of num_attention_heads where head_dim "
                f"is not given; got {hidden} and {heads}"
            )
        rope = given.rope()
        biased = given.flag("attention_bias")
        context = given.count("max_position_embeddings", defaults["max_position_embeddings"])
        kv_heads = given.count("num_key_value_heads", defaults["num_key_value_heads"], null=heads)
        theta = rope if "rope_theta" in rope.fields else given
        config = cls(
            **numbers,
            num_key_value_heads=kv_heads,
            head_dim=given.count("head_dim", hidden // heads, null=hidden // heads),
            max_position_embeddings=min(context, _window(given, model_type) or context),
            rms_norm_eps=given.number("rms_norm_eps", 1e-6, least=0.0),
            rope_theta=theta.number("rope_theta", 10000.0),
            rope_scaling=_rope_scaling(rope, given, context),
            tie_word_embeddings=given.flag("tie_word_embeddings"),
            qkv_bias=biased or model_type == "qwen2",
            output_bias=biased and model_type == "llama",
            mlp_bias=given.flag("mlp_bias"),
            bos_token_id=given.token_id("bos_token_id"),
            eos_token_ids=given.token_ids("eos_token_id"),
        )
        config._check(source)
        return config

    def _check(self, source: str) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"{source}: num_attention_heads must be a multiple of num_key_value_heads; got "
                f"{self.num_attention_heads} and {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"{source}: head_dim must be even for RoPE; got {self.head_dim}")

    @property
    def parameters(self) -> int:
        """Number of weights."""
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads
        layer = self.hidden_size * (heads * self.head_dim + 3 * self.intermediate_size + 2)
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size
        return self.num_hidden_layers * layer + self.hidden_size * (embeddings + 1)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path}: a checkpoint directory needs this file; {error.strerror}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a JSON file; {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: a JSON object is expected; got a {type(fields).__name__}")
    return fields


def _window(given: Fields, model_type: str) -> int | None:
    """The sliding window: attention here is full, and exact up to it."""
    if model_type == "llama" or (model_type == "qwen2" and not given.flag("use_sliding_window")):
        return None
    return given.count("sliding_window", 4096, null=None, least=0) or None


def _rope_scaling(rope: Fields, given: Fields, context: int) -> RopeScaling:
    """``rope_type``, or ``type`` as older files call it, and its numbers."""
    old = rope.choice("type", "default", ROPE_TYPES) if "rope_type" not in rope.fields else ""
    rope_type = rope.choice("rope_type", old, ROPE_TYPES)
    # As transformers: the object's own comes first, and null is as good as none.
    for where in (rope, given):
        if where.fields.get("partial_rotary_factor") is not None:
            where.only("partial_rotary_factor", 1.0)
            break
    if rope_type == "default":
        return RopeScaling()
    names = ("factor", "low_freq_factor", "high_freq_factor")[: 1 if rope_type == "linear" else 3]
    missing = [name for name in names if name not in rope.fields]
    if missing:
        raise CheckpointError(
            f"{rope.source}: {rope.inside}of type {rope_type} needs {', '.join(names)}; "
            f"{', '.join(missing)} missing"
        )
    scaling = RopeScaling(rope_type, **{name: rope.number(name, None) for name in names})  # type: ignore[arg-type]
    if rope_type == "linear":
        return scaling
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise CheckpointError(
            f"{rope.source}: {rope.inside}high_freq_factor must be larger than low_freq_factor; "
            f"got {scaling.high_freq_factor:g} and {scaling.low_freq_factor:g}"
        )
    name = "original_max_position_embeddings"
    return dataclasses.replace(scaling, original_max_position_embeddings=rope.count(name, context))
