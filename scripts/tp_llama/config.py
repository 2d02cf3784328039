"""config.json of a Hugging Face directory -> the numbers that this decoder needs.

Fields: huggingface.co/docs/transformers, LlamaConfig (also MistralConfig and Qwen2Config, which
describe the same decoder with other biases or a sliding window).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError

MODEL_TYPES = ("llama", "mistral", "qwen2")
ROPE_TYPES = ("default", "linear", "llama3")


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
            tokens = _token_ids(_read_json(generation).get("eos_token_id"))
            more = tuple(t for t in tokens if t not in config.eos_token_ids)
            config = cls(**{**config.__dict__, "eos_token_ids": config.eos_token_ids + more})
        return config

    @classmethod
    def from_dict(cls, fields: dict[str, Any], source: str = "config.json") -> LlamaConfig:
        model_type = fields.get("model_type", "llama")
        _require(model_type in MODEL_TYPES, source, "model_type", model_type, MODEL_TYPES)
        activation = fields.get("hidden_act", "silu")
        _require(activation == "silu", source, "hidden_act", activation, ("silu",))
        numbers = {name: _positive_int(fields, name, source) for name in _REQUIRED}
        heads = numbers["num_attention_heads"]
        head_dim = fields.get("head_dim") or numbers["hidden_size"] // heads
        rope = {**(fields.get("rope_scaling") or {}), **(fields.get("rope_parameters") or {})}
        biased = bool(fields.get("attention_bias", False))
        config = cls(
            **numbers,
            num_key_value_heads=fields.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            max_position_embeddings=_context(fields),
            rms_norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
            rope_theta=float(fields.get("rope_theta") or rope.get("rope_theta") or 10000.0),
            rope_scaling=_rope_scaling(rope, fields, source),
            tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
            qkv_bias=biased or model_type == "qwen2",
            output_bias=biased and model_type == "llama",
            mlp_bias=bool(fields.get("mlp_bias", False)),
            bos_token_id=fields.get("bos_token_id"),
            eos_token_ids=_token_ids(fields.get("eos_token_id")),
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


_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path}: a checkpoint directory needs this file; {error.strerror}"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not a JSON file; {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: a JSON object is expected; got a {type(fields).__name__}")
    return fields


def _require(ok: bool, source: str, name: str, given: object, accepted: tuple[str, ...]) -> None:
    if not ok:
        raise CheckpointError(f"{source}: {name} is {given!r}; accepted: {', '.join(accepted)}")


def _positive_int(fields: dict[str, Any], name: str, source: str) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{source}: {name} must be a positive integer; got {value!r}")
    return value


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _context(fields: dict[str, Any]) -> int:
    """Tokens that attention treats exactly: attention here is full, so a window is a limit."""
    context = int(fields.get("max_position_embeddings", 2048))
    window = fields.get("sliding_window")
    if window and fields.get("use_sliding_window", True):
        return min(context, int(window))
    return context


def _rope_scaling(rope: dict[str, Any], fields: dict[str, Any], source: str) -> RopeScaling:
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    _require(rope_type in ROPE_TYPES, source, "rope_scaling's rope_type", rope_type, ROPE_TYPES)
    partial = fields.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0))
    _require(partial == 1.0, source, "partial_rotary_factor", partial, ("1.0",))
    if rope_type == "default":
        return RopeScaling()
    names = ("factor",) if rope_type == "linear" else tuple(RopeScaling.__dataclass_fields__)[1:]
    missing = [name for name in names if name not in rope]
    if missing:
        raise CheckpointError(
            f"{source}: rope_scaling of type {rope_type} needs {', '.join(names)}; "
            f"{', '.join(missing)} missing"
        )
    return RopeScaling(rope_type, **{name: rope[name] for name in names})
