"""Random weights of a given shape, made on the rank's own device: for measuring, not for text."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import LlamaConfig
from .loader import LayerWeights, LlamaWeights
from .partition import Partition


def random_weights(
    config: LlamaConfig,
    part: Partition,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
) -> LlamaWeights:
    """One rank's weights; the norms are the same on all ranks; no biases, nothing tied.

    The variances keep the hidden states near 1 through any number of layers: a matrix divides by
    its whole input width, and those that add to the residual by twice the layers too (GPT-2).
    """
    own = torch.Generator(device).manual_seed(seed + 1 + part.rank)
    shared = torch.Generator(device).manual_seed(seed)
    hidden, dim = config.hidden_size, config.head_dim
    heads, kv_heads, mlp = part.heads * dim, part.kv_heads * dim, part.intermediate
    branches = 2 * config.num_hidden_layers

    def matrix(rows: int, columns: int, variance: float) -> Tensor:
        weight = torch.empty(rows, columns, dtype=dtype, device=device)
        return weight.normal_(0.0, variance**0.5, generator=own)

    def norm() -> Tensor:
        weight = torch.empty(hidden, dtype=dtype, device=device)
        return weight.normal_(1.0, 0.1, generator=shared)

    def layer() -> LayerWeights:
        return LayerWeights(
            input_norm=norm(),
            qkv=matrix(heads + 2 * kv_heads, hidden, 1 / hidden),
            qkv_bias=None,
            output=matrix(hidden, heads, 1 / (config.num_attention_heads * dim * branches)),
            output_bias=None,
            post_attention_norm=norm(),
            gate_up=matrix(2 * mlp, hidden, 1 / hidden),
            gate_up_bias=None,
            down=matrix(hidden, mlp, 1 / (config.intermediate_size * branches)),
            down_bias=None,
        )

    return LlamaWeights(
        embedding=matrix(part.vocab, hidden, 1.0),
        layers=[layer() for _ in range(config.num_hidden_layers)],
        norm=norm(),
        head=matrix(part.vocab, hidden, 1 / hidden),
    )
