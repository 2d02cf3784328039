"""Load this rank's part of a checkpoint, and nothing of the other ranks' parts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .agreement import together
from .checkpoint_files import CheckpointFiles, as_dtype
from .config import LlamaConfig
from .errors import CheckpointError
from .partition import Partition

SHOWN_PROBLEMS = 3


@dataclass(frozen=True)
class LayerWeights:
    """One layer's part. Biases may be None. q, k, v and gate, up are stacked along the rows."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    post_attention_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


@dataclass(frozen=True)
class LlamaWeights:
    """One rank's weights. ``embedding`` and ``head`` are ``[partition.vocab, hidden]``."""

    embedding: Tensor
    layers: list[LayerWeights]
    norm: Tensor
    head: Tensor


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that the checkpoint must hold, with its whole shape."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        attention, feed = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        shapes |= {
            f"model.layers.{i}.input_layernorm.weight": (hidden,),
            f"{attention}q_proj.weight": (q, hidden),
            f"{attention}k_proj.weight": (kv, hidden),
            f"{attention}v_proj.weight": (kv, hidden),
            f"{attention}o_proj.weight": (hidden, q),
            f"model.layers.{i}.post_attention_layernorm.weight": (hidden,),
            f"{feed}gate_proj.weight": (mlp, hidden),
            f"{feed}up_proj.weight": (mlp, hidden),
            f"{feed}down_proj.weight": (hidden, mlp),
        }
        if config.qkv_bias:
            shapes |= {
                f"{attention}{name}_proj.bias": (size,)
                for name, size in (("q", q), ("k", kv), ("v", kv))
            }
        if config.output_bias:
            shapes[f"{attention}o_proj.bias"] = (hidden,)
        if config.mlp_bias:
            shapes |= {f"{feed}gate_proj.bias": (mlp,), f"{feed}up_proj.bias": (mlp,)}
            shapes[f"{feed}down_proj.bias"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


class RankReader:
    """Reads the slices of one rank in the dtype and on the device where they will be used."""

    def __init__(
        self,
        files: CheckpointFiles,
        config: LlamaConfig,
        part: Partition,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.files, self.config, self.part = files, config, part
        self.dtype, self.device = dtype, device

    def whole(self, name: str) -> Tensor:
        return as_dtype(self.files.read(name, slice(None)), self.dtype, self.device)

    def stacked_rows(self, *parts: tuple[str, int, int]) -> Tensor:
        """Rows ``[start, start + count)`` of several ``(name, start, count)``, in one tensor."""
        pieces = [self.files.read(name, slice(s, s + n)) for name, s, n in parts]
        return as_dtype(torch.cat(pieces), self.dtype, self.device)

    def columns(self, name: str, count: int) -> Tensor:
        """This rank's ``count`` columns of a row-parallel weight."""
        start = self.part.rank * count
        piece = self.files.read(name, slice(None), slice(start, start + count))
        return as_dtype(piece, self.dtype, self.device)

    def vocabulary_rows(self, name: str) -> Tensor:
        """This rank's rows, with zeros where the vocabulary ends before them."""
        rows, size = self.part.vocab, self.config.vocab_size
        start = min(self.part.rank * rows, size)
        piece = self.files.read(name, slice(start, min(start + rows, size)))
        padded = torch.zeros(rows, self.config.hidden_size, dtype=self.dtype, device=self.device)
        padded[: piece.size(0)].copy_(piece)
        return padded

    def layer(self, index: int) -> LayerWeights:
        config, part = self.config, self.part
        layer = f"model.layers.{index}"
        attention, feed = f"{layer}.self_attn", f"{layer}.mlp"
        q, kv = part.heads * config.head_dim, part.kv_heads * config.head_dim
        first_kv, mlp = part.first_kv_head * config.head_dim, part.intermediate

        def qkv(kind: str) -> Tensor:
            return self.stacked_rows(
                (f"{attention}.q_proj.{kind}", part.rank * q, q),
                (f"{attention}.k_proj.{kind}", first_kv, kv),
                (f"{attention}.v_proj.{kind}", first_kv, kv),
            )

        def gate_up(kind: str) -> Tensor:
            start = part.rank * mlp
            return self.stacked_rows(
                (f"{feed}.gate_proj.{kind}", start, mlp), (f"{feed}.up_proj.{kind}", start, mlp)
            )

        return LayerWeights(
            input_norm=self.whole(f"{layer}.input_layernorm.weight"),
            qkv=qkv("weight"),
            qkv_bias=qkv("bias") if config.qkv_bias else None,
            output=self.columns(f"{attention}.o_proj.weight", q),
            output_bias=self.whole(f"{attention}.o_proj.bias") if config.output_bias else None,
            post_attention_norm=self.whole(f"{layer}.post_attention_layernorm.weight"),
            gate_up=gate_up("weight"),
            gate_up_bias=gate_up("bias") if config.mlp_bias else None,
            down=self.columns(f"{feed}.down_proj.weight", mlp),
            down_bias=self.whole(f"{feed}.down_proj.bias") if config.mlp_bias else None,
        )

    def everything(self) -> LlamaWeights:
        embedding = self.vocabulary_rows("model.embed_tokens.weight")
        tied = self.config.tie_word_embeddings
        return LlamaWeights(
            embedding=embedding,
            layers=[self.layer(i) for i in range(self.config.num_hidden_layers)],
            norm=self.whole("model.norm.weight"),
            head=embedding if tied else self.vocabulary_rows("lm_head.weight"),
        )


def check(files: CheckpointFiles, config: LlamaConfig) -> None:
    """Raises CheckpointError that names the tensors and files which are not as they must be."""
    problems = files.problems(tensor_shapes(config))
    if not problems:
        return
    shown = "; ".join(problems[:SHOWN_PROBLEMS])
    more = len(problems) - SHOWN_PROBLEMS
    raise CheckpointError(shown + (f"; and {more} problems more" if more > 0 else ""))


def load(
    directory: Path, tp: Any, dtype: torch.dtype | None = None
) -> tuple[LlamaConfig, Partition, LlamaWeights]:
    """Read the config and this rank's weights. Collective over ``tp``.

    Args:
        directory: holds config.json and the safetensors.
        tp: the GroupCoordinator of the tensor-parallel ranks; weights land on its device.
        dtype: of the weights in memory; None: bf16 on a GPU, fp32 on a CPU.

    Raises AgreedError, the same on every rank, if any rank cannot load its part; the headers of
    all files are checked before the first tensor is read.
    """
    device = torch.device(tp.device)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def load_part() -> tuple[LlamaConfig, Partition, LlamaWeights]:
        config = LlamaConfig.from_directory(directory)
        part = Partition.of(config, tp.rank_in_group, tp.world_size)
        with CheckpointFiles(directory) as files:
            check(files, config)
            weights = RankReader(files, config, part, dtype, device).everything()
        return config, part, weights

    return together(tp, load_part)
