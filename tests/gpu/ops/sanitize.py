"""A few small cases of every op, for compute-sanitizer: see scripts/sanitize_gpu."""

from __future__ import annotations

from typing import Any

import torch

import kvcache_ops
from tests.unit.ops.ops_cases import sample


def many_rows(device: str) -> None:
    """Calls large enough to prefetch what later blocks read, up to the last row.

    The maps name exactly what there is: a step past its end is a step out of its allocation.
    """
    rows, block = 14000, 64
    blocks = -(-rows // block)
    table = torch.arange(blocks, dtype=torch.int32, device=device).view(1, -1)
    ends = torch.tensor([0, rows], dtype=torch.int32, device=device)
    token_to_seq = torch.zeros(rows, dtype=torch.int32, device=device)
    scale = torch.ones(1, device=device)
    bf16: Any = dict(dtype=torch.bfloat16, device=device)
    out = torch.zeros(rows, 576, **bf16)
    for cache, kv in (
        (torch.ones(blocks, block, 576, **bf16), "auto"),
        (torch.ones(blocks, block, 576, dtype=torch.uint8, device=device), "fp8"),
    ):
        kvcache_ops.gather_and_maybe_dequant_cache(
            cache, out, table, ends, token_to_seq, rows, kv, scale
        )
    kvcache_ops.cp_gather_cache(torch.ones(blocks, block, 576, **bf16), out, table, ends, 1)
    entries = torch.zeros(blocks, block, 656, dtype=torch.uint8, device=device)
    kvcache_ops.cp_gather_and_upconvert_fp8_kv_cache(entries, out, table, ends[:1], 1)

    codes = torch.ones((4 << 20) + 24, dtype=torch.uint8, device=device)
    kvcache_ops.convert_fp8(torch.zeros(codes.shape, **bf16), codes)

    tokens, angles = 8192, torch.ones(8192, 128, device=device)
    query, key = torch.ones(tokens, 32 * 128, **bf16), torch.ones(tokens, 8 * 128, **bf16)
    kvcache_ops.rotary_embedding(
        torch.arange(tokens, device=device), query, key, 128, angles, is_neox=True
    )


def many_sequences(device: str) -> None:
    """Decode attention with two KV heads a block, over caches that hold exactly the tokens."""
    sequences, length = 150, 40
    bf16: Any = dict(dtype=torch.bfloat16, device=device)
    blocks = sequences * length // 8
    table = torch.arange(blocks, dtype=torch.int32, device=device).view(sequences, -1)
    kvcache_ops.paged_attention(
        torch.zeros(sequences, 16, 128, **bf16),
        torch.ones(sequences, 16, 128, **bf16),
        torch.ones(blocks, 8, 4, 128, **bf16),
        torch.ones(blocks, 8, 4, 128, **bf16),
        table,
        torch.full((sequences,), length, dtype=torch.int32, device=device),
        128**-0.5,
    )


def main() -> None:
    many_rows("cuda")
    many_sequences("cuda")
    count = 0
    for case in sample(4):
        args = case.args("cuda")
        getattr(kvcache_ops, case.op)(**args)
        count += 1
    torch.cuda.synchronize()
    print(f"{count} cases ran")


if __name__ == "__main__":
    main()
