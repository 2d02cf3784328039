"""Random checkpoints of the Llama family, and a dense decoder to hold the job against.

The decoder here is written from the model's definition (RoPE as complex numbers, attention as an
explicit masked softmax, no cache) and shares nothing with the job.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 263,  # divided by neither 2 nor 4
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 257,
}


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, mlp, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    matrices = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
        for name, shape in matrices.items():
            shapes[f"{prefix}{name}.weight"] = shape
            biased = config.get("attention_bias" if "attn" in name else "mlp_bias", False)
            if biased:
                shapes[f"{prefix}{name}.bias"] = shape[:1]
    return shapes


def write_checkpoint(
    directory: Path, files: int = 1, dtype: torch.dtype = torch.bfloat16, **fields: Any
) -> dict[str, Tensor]:
    """Write config.json and the weights in ``files`` files; the whole tensors, as stored."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {**TINY, **fields}
    (directory / "config.json").write_text(json.dumps(config))
    random = torch.Generator().manual_seed(5)
    tensors = {}
    for name, shape in shapes_of(config).items():
        noise = torch.randn(shape, generator=random)
        is_norm = "norm" in name
        tensors[name] = (1 + 0.1 * noise if is_norm else noise * shape[-1] ** -0.5).to(dtype)
    write_weights(directory, tensors, files)
    return tensors


def write_weights(directory: Path, tensors: dict[str, Tensor], files: int = 1) -> None:
    if files == 1:
        save_file(tensors, directory / "model.safetensors")
        return
    names = list(tensors)
    weight_map = {}
    for i in range(files):
        file = f"model-{i + 1:05}-of-{files:05}.safetensors"
        part = names[i::files]
        save_file({name: tensors[name] for name in part}, directory / file)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


class DenseReference:
    """``logits(tokens [T]) -> fp32 [T, vocab]`` by the definition, in fp64 inside."""

    def __init__(self, directory: Path, frequencies: Tensor | None = None) -> None:
        self.config = json.loads((directory / "config.json").read_text())
        self.w: dict[str, Tensor] = {}
        for path in directory.glob("*.safetensors"):
            self.w |= {name: t.double() for name, t in load_file(path).items()}
        half = torch.arange(self.config["head_dim"] // 2, dtype=torch.float64)
        default = self.config["rope_theta"] ** (-2 * half / self.config["head_dim"])
        self.frequencies = default if frequencies is None else frequencies.double()

    def _linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.w[f"{name}.weight"].T
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def _norm(self, name: str, x: Tensor) -> Tensor:
        mean_square = (x * x).mean(-1, keepdim=True)
        return x / (mean_square + self.config["rms_norm_eps"]).sqrt() * self.w[f"{name}.weight"]

    def _rope(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.size(0), dtype=torch.float64), self.frequencies)
        first, second = x.chunk(2, -1)
        turned = (
            torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[:, None]
        )
        return torch.cat((turned.real, turned.imag), -1)

    def _attention(self, prefix: str, x: Tensor) -> Tensor:
        length, dim = x.size(0), self.config["head_dim"]
        q, k, v = (self._linear(f"{prefix}.{n}_proj", x).view(length, -1, dim) for n in "qkv")
        q, k = self._rope(q), self._rope(k)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        heads = []
        for h in range(q.size(1)):
            kv = h * k.size(1) // q.size(1)
            scores = (q[:, h] @ k[:, kv].T / dim**0.5).masked_fill(future, float("-inf"))
            heads.append(scores.softmax(-1) @ v[:, kv])
        return self._linear(f"{prefix}.o_proj", torch.cat(heads, -1))

    def logits(self, tokens: list[int]) -> Tensor:
        x = self.w["model.embed_tokens.weight"][torch.tensor(tokens)]
        for i in range(self.config["num_hidden_layers"]):
            p = f"model.layers.{i}"
            x = x + self._attention(f"{p}.self_attn", self._norm(f"{p}.input_layernorm", x))
            y = self._norm(f"{p}.post_attention_layernorm", x)
            gate = self._linear(f"{p}.mlp.gate_proj", y)
            product = gate * gate.sigmoid() * self._linear(f"{p}.mlp.up_proj", y)
            x = x + self._linear(f"{p}.mlp.down_proj", product)
        tied = self.config["tie_word_embeddings"]
        head = self.w["model.embed_tokens.weight" if tied else "lm_head.weight"]
        return (self._norm("model.norm", x) @ head.T).float()

    def greedy(self, prompt: list[int], new_tokens: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(new_tokens):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
            if tokens[-1] == self.config["eos_token_id"]:
                break
        return tokens[len(prompt) :]
