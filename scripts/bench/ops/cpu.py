"""The attention, norm, RoPE and activation ops on tensors of a usual size, and all cases together,
for the case ops_cpu."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import plain
from .case import (
    HEAD,
    HEADS,
    HIDDEN,
    KV_HEADS,
    MAX_POSITION,
    Case,
    angles,
    case,
    error_of,
    one,
    randn,
    size,
)
from .cpu_cache import cache_cases
from .plain import BLOCK

# Decode attention has a quarter of the heads; the context of each of n sequences, else 64.
CONTEXT = {1: 4096, 64: 1024, 4096: 64}


def elementwise(n: int, dtype: torch.dtype) -> Iterator[Case]:
    x, residual, weight = (randn(*s, dtype=dtype) for s in ((n, HIDDEN), (n, HIDDEN), (HIDDEN,)))
    out, wide = torch.empty_like(x), randn(n, 2 * HIDDEN, dtype=dtype)
    error = error_of(dtype)
    tensors = dict(out=out, input=x, weight=weight, epsilon=1e-5)
    yield case("rms_norm", dtype, tensors, written=("out",), moved=size(x, out), tolerance=error)
    yield case(
        "fused_add_rms_norm",
        dtype,
        dict(input=x.clone(), residual=residual, weight=weight, epsilon=1e-5),
        written=("input", "residual"),
        moved=2 * size(x, residual),
        tolerance=error,
    )
    query, key = randn(n, HEADS, HEAD, dtype=dtype), randn(n, KV_HEADS, HEAD, dtype=dtype)
    yield case(
        "rotary_embedding",
        dtype,
        dict(
            positions=torch.randint(0, MAX_POSITION, (n,)),
            query=query,
            key=key,
            head_size=HEAD,
            cos_sin_cache=angles(HEAD, dtype),
            is_neox=True,
        ),
        written=("query", "key"),
        moved=2 * size(query, key),
        tolerance=error,
    )
    activations: dict[str, dict[str, float]] = {
        "silu_and_mul": {},
        "mul_and_silu": {},
        "gelu_and_mul": {},
        "gelu_tanh_and_mul": {},
        "fatrelu_and_mul": {"threshold": 0.3},
        "swigluoai_and_mul": {"alpha": 1.702, "limit": 7.0},
    }
    for op, scalars in activations.items():
        name = "result" if op == "silu_and_mul" else "out"
        tensors = {name: out, "input": wide, **scalars}
        yield case(op, dtype, tensors, written=(name,), moved=size(out, wide), tolerance=error)


def attention(n: int, dtype: torch.dtype) -> Iterator[Case]:
    hq, hkv, context = HEADS // 4, KV_HEADS // 4, CONTEXT.get(n, 64)
    width = context // BLOCK
    query = randn(n, hq, HEAD, dtype=dtype)
    common = dict(
        out=torch.empty_like(query),
        query=query,
        block_tables=torch.randperm(n * width).view(n, width).int(),
        seq_lens=torch.full((n,), context, dtype=torch.int32),
        scale=HEAD**-0.5,
        k_scale=one(),
        v_scale=one(),
    )
    more = dict(written=("out",), tolerance=error_of(dtype), memory_bound=False)
    for kv in ("auto", "fp8"):
        caches = [randn(n * width, BLOCK, hkv, HEAD, dtype=dtype) for _ in range(2)]
        if kv == "fp8":
            caches = [plain.quantized(c) for c in caches]
        moved = size(*caches, query, query)
        tensors = dict(common, key_cache=caches[0], value_cache=caches[1], kv_cache_dtype=kv)
        yield case("paged_attention", dtype, tensors, moved=moved, variant=kv, **more)
    x = 16 // dtype.itemsize
    packed = dict(
        common,
        key_cache=randn(n * width, hkv, HEAD // x, BLOCK, x, dtype=dtype),
        value_cache=randn(n * width, hkv, HEAD, BLOCK, dtype=dtype),
        num_kv_heads=hkv,
        block_size=BLOCK,
        max_seq_len=context,
        alibi_slopes=None,
        kv_cache_dtype="auto",
    )
    moved = size(packed["key_cache"], packed["value_cache"], query, query)
    more.update(moved=moved, plain=plain.paged_attention_packed)
    yield case("paged_attention_v1", dtype, packed, **more)
    parts = -(-context // 512)
    scratch = dict(
        exp_sums=torch.empty(n, hq, parts),
        max_logits=torch.empty(n, hq, parts),
        tmp_out=torch.empty(n, hq, parts, HEAD, dtype=dtype),
    )
    yield case("paged_attention_v2", dtype, dict(packed, **scratch), **more)


def merge(n: int, dtype: torch.dtype) -> Iterator[Case]:
    tensors = dict(
        output=torch.empty(n, HEADS, HEAD, dtype=dtype),
        prefix_output=randn(n, HEADS, HEAD, dtype=dtype),
        prefix_lse=torch.randn(HEADS, n),
        suffix_output=randn(n, HEADS, HEAD, dtype=dtype),
        suffix_lse=torch.randn(HEADS, n),
        output_lse=torch.empty(HEADS, n),
    )
    yield case(
        "merge_attn_states",
        dtype,
        tensors,
        written=("output", "output_lse"),
        moved=size(*tensors.values()),
        tolerance=error_of(dtype),
    )


def cases(n: int, dtype: torch.dtype) -> Iterator[Case]:
    yield from cache_cases(n, dtype)
    yield from attention(n, dtype)
    yield from merge(n, dtype)
    yield from elementwise(n, dtype)
