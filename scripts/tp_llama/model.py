"""The decoder: RMSNorm, RoPE, grouped-query attention over a paged cache, SwiGLU.

Tokens of all sequences are one flat dimension ``T``. Prefill attends within the prompts, which are
dense; decode has one token a sequence and attends over the paged cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import kvcache_ops as ops

from .config import LlamaConfig
from .kv_cache import LayerCache, PagedKVCache
from .layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelLogits,
)
from .loader import LayerWeights, LlamaWeights
from .partition import Partition
from .rope import cos_sin_table
from .timed_group import TimedGroup


@dataclass(frozen=True)
class DecodeInputs:
    """One decode step for ``S`` sequences; fixed buffers, so that the step can be captured.

    A sequence that has ended has slot -1 and length 0: nothing is written or read for it.
    """

    tokens: Tensor  # int64 [S], the last token of each sequence
    positions: Tensor  # int64 [S], their positions
    slots: Tensor  # int64 [S], where their keys and values go
    block_tables: Tensor  # int32 [S, blocks]
    seq_lens: Tensor  # int32 [S], the new token included


# (query [T, heads, D], key [T, kv heads, D], value, the layer's cache) -> [T, heads, D]
AttentionFn = Callable[[Tensor, Tensor, Tensor, LayerCache], Tensor]


class DecoderLayer:
    """Attention and MLP of one layer, this rank's heads and columns."""

    def __init__(self, config: LlamaConfig, part: Partition, w: LayerWeights, tp: TimedGroup):
        self.config, self.part = config, part
        self.input_norm, self.post_attention_norm = w.input_norm, w.post_attention_norm
        self.qkv = ColumnParallelLinear(w.qkv, w.qkv_bias)
        self.output = RowParallelLinear(w.output, w.output_bias, tp)
        self.gate_up = ColumnParallelLinear(w.gate_up, w.gate_up_bias)
        self.down = RowParallelLinear(w.down, w.down_bias, tp)

    def attention(
        self,
        x: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        slots: Tensor,
        cache: LayerCache,
        attend: AttentionFn,
    ) -> Tensor:
        heads, kv_heads, dim = self.part.heads, self.part.kv_heads, self.config.head_dim
        q, k, v = (
            part.unflatten(-1, (-1, dim))
            for part in self.qkv(x).split((heads * dim, kv_heads * dim, kv_heads * dim), dim=-1)
        )
        ops.rotary_embedding(positions, q, k, dim, cos_sin, True)
        ops.reshape_and_cache_flash(
            k, v, cache.key, cache.value, slots, cache.dtype, cache.k_scale, cache.v_scale
        )
        return self.output(attend(q, k, v, cache).flatten(1))

    def mlp(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up(x)
        product = gate_up.new_empty(x.size(0), self.part.intermediate)
        ops.silu_and_mul(product, gate_up)
        return self.down(product)


class LlamaModel:
    """One rank's decoder. ``length`` is the longest sequence that will be asked for, in tokens."""

    def __init__(
        self,
        config: LlamaConfig,
        part: Partition,
        weights: LlamaWeights,
        tp: TimedGroup,
        length: int,
    ) -> None:
        self.config, self.part, self.tp = config, part, tp
        self.embedding = VocabParallelEmbedding(weights.embedding, tp)
        self.layers = [DecoderLayer(config, part, w, tp) for w in weights.layers]
        self.norm = weights.norm
        self.logits = VocabParallelLogits(weights.head, config.vocab_size, tp)
        self.cos_sin = cos_sin_table(config, length, weights.norm.device)
        self.scale = config.head_dim**-0.5

    def prefill(
        self,
        tokens: Tensor,
        positions: Tensor,
        slots: Tensor,
        lengths: list[int],
        cache: PagedKVCache,
    ) -> Tensor:
        """Whole prompts, one after the other; their keys and values go into the cache.

        Args:
            tokens, positions, slots: int64 ``[T]``.
            lengths: tokens of each of the ``S`` prompts; they add up to ``T``.

        Returns this rank's logits of the last token of each prompt, fp32 ``[S, part.vocab]``.
        """

        def attend(q: Tensor, k: Tensor, v: Tensor, _: LayerCache) -> Tensor:
            return torch.cat(
                [
                    self._causal_attention(*prompt)
                    for prompt in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
                ]
            )

        hidden = self._forward(tokens, positions, slots, cache, attend)
        last = torch.tensor(lengths, device=hidden.device).cumsum(0) - 1
        return self.logits(hidden[last])

    def decode(self, inputs: DecodeInputs, cache: PagedKVCache) -> Tensor:
        """One token more for each sequence; this rank's logits, fp32 ``[S, part.vocab]``.

        Reads and writes tensors only (no host value of them), so a CUDA graph can hold it.
        """

        def attend(q: Tensor, k: Tensor, v: Tensor, layer: LayerCache) -> Tensor:
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            ops.paged_attention(
                out,
                q,
                layer.key,
                layer.value,
                inputs.block_tables,
                inputs.seq_lens,
                self.scale,
                kv_cache_dtype=layer.dtype,
                k_scale=layer.k_scale,
                v_scale=layer.v_scale,
            )
            return out

        hidden = self._forward(inputs.tokens, inputs.positions, inputs.slots, cache, attend)
        return self.logits(hidden)

    def _causal_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Dense attention within one prompt, ``[L, heads, D]``."""
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=True
        )
        return out.squeeze(0).transpose(0, 1)

    def _forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        slots: Tensor,
        cache: PagedKVCache,
        attend: AttentionFn,
    ) -> Tensor:
        """Normalised hidden states, ``[T, hidden]``, the same on every rank."""
        eps = self.config.rms_norm_eps
        residual = self.embedding(tokens)
        x = torch.empty_like(residual)
        ops.rms_norm(x, residual, self.layers[0].input_norm, eps)
        # Each add to the residual is fused with the norm after it; the last one is the model's.
        following = [layer.input_norm for layer in self.layers[1:]] + [self.norm]
        for layer, layer_cache, next_norm in zip(self.layers, cache.layers, following, strict=True):
            x = layer.attention(x, positions, self.cos_sin, slots, layer_cache, attend)
            ops.fused_add_rms_norm(x, residual, layer.post_attention_norm, eps)
            x = layer.mlp(x)
            ops.fused_add_rms_norm(x, residual, next_norm, eps)
        return x
