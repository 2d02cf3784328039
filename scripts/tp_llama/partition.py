"""Which part of every tensor belongs to which rank.

Heads, MLP columns and vocabulary rows are split; norms are on every rank. When there are more
ranks than KV heads, neighbouring ranks hold the same KV head.
"""

from __future__ import annotations

from dataclasses import dataclass

from .config import LlamaConfig
from .errors import CheckpointError


@dataclass(frozen=True)
class Partition:
    """Rank ``rank`` of ``world_size`` and what it holds; all fields count elements of its own."""

    rank: int
    world_size: int
    heads: int
    kv_heads: int
    first_kv_head: int
    intermediate: int
    vocab: int

    @classmethod
    def of(cls, config: LlamaConfig, rank: int, world_size: int) -> Partition:
        """Raises CheckpointError, the same on every rank, where tp does not divide the model."""
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        for name, count in (
            ("num_attention_heads", heads),
            ("intermediate_size", config.intermediate_size),
        ):
            if count % world_size:
                raise CheckpointError(
                    f"tp {world_size} must divide {name}, which is {count} in this checkpoint; "
                    f"accepted: {accepted_sizes(config)}"
                )
        if kv_heads % world_size and world_size % kv_heads:
            raise CheckpointError(
                f"tp {world_size} must divide num_key_value_heads or be a multiple of it; it is "
                f"{kv_heads} in this checkpoint; accepted: {accepted_sizes(config)}"
            )
        return cls(
            rank=rank,
            world_size=world_size,
            heads=heads // world_size,
            kv_heads=max(1, kv_heads // world_size),
            first_kv_head=rank * kv_heads // world_size,
            intermediate=config.intermediate_size // world_size,
            # The last ranks may hold fewer rows than this, padded with zeros.
            vocab=-(-config.vocab_size // world_size),
        )


def accepted_sizes(config: LlamaConfig) -> str:
    """The tp sizes that this checkpoint can be split into, as text."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    sizes = [
        n
        for n in range(1, heads + 1)
        if heads % n == 0
        and config.intermediate_size % n == 0
        and (kv_heads % n == 0 or n % kv_heads == 0)
    ]
    return ", ".join(map(str, sizes))
