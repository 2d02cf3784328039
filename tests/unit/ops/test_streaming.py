"""Results larger than the last-level cache are stored past it: the same bits as in small parts.

32 MB of it are common; where there is more, both ways go through the cache and are equal anyway.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import kvcache_ops

ROWS, PART = 2048, 256  # 16 KB of bf16 in a row of input: 48 MB in all, 6 MB a part


@pytest.mark.parametrize(
    "op", [kvcache_ops.silu_and_mul, kvcache_ops.gelu_and_mul, kvcache_ops.swigluoai_and_mul]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_activations(op: Callable[..., None], dtype: torch.dtype) -> None:
    x = torch.randn(ROWS, 8192, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole, parts = (torch.empty(ROWS, 4096, dtype=dtype) for _ in range(2))
    op(whole, x)
    for out, given in zip(parts.split(PART), x.split(PART), strict=True):
        op(out, given)
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rms_norm(dtype: torch.dtype) -> None:
    x = torch.randn(ROWS, 8192, generator=torch.Generator().manual_seed(4)).to(dtype)
    weight = torch.rand(8192, generator=torch.Generator().manual_seed(5)).to(dtype)
    whole, parts = torch.empty_like(x), torch.empty_like(x)
    kvcache_ops.rms_norm(whole, x, weight, 1e-5)
    for out, given in zip(parts.split(PART), x.split(PART), strict=True):
        kvcache_ops.rms_norm(out, given, weight, 1e-5)
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("kv_dtype", ["fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_convert_fp8(dtype: torch.dtype, kv_dtype: str) -> None:
    x = torch.randn(ROWS, 8200, generator=torch.Generator().manual_seed(6)).to(dtype)
    codes, codes_of_parts = (torch.empty(x.shape, dtype=torch.uint8) for _ in range(2))
    back, back_of_parts = torch.empty_like(x), torch.empty_like(x)
    kvcache_ops.convert_fp8(codes, x, 0.3, kv_dtype)
    kvcache_ops.convert_fp8(back, codes, 0.3, kv_dtype)
    for i in range(0, ROWS, PART):
        of = slice(i, i + PART)
        kvcache_ops.convert_fp8(codes_of_parts[of], x[of], 0.3, kv_dtype)
        kvcache_ops.convert_fp8(back_of_parts[of], codes[of], 0.3, kv_dtype)
    assert torch.equal(codes, codes_of_parts)
    assert torch.equal(back, back_of_parts)


def test_merge_attn_states() -> None:
    make = torch.Generator().manual_seed(1)
    prefix, suffix = (torch.randn(ROWS, 64, 64, generator=make).bfloat16() for _ in range(2))
    a, b = (torch.randn(64, ROWS, generator=make) for _ in range(2))
    whole, parts = torch.empty_like(prefix), torch.empty_like(prefix)
    kvcache_ops.merge_attn_states(whole, prefix, a, suffix, b)
    for i in range(0, ROWS, PART):
        of = slice(i, i + PART)
        lse_a, lse_b = a[:, of].contiguous(), b[:, of].contiguous()
        kvcache_ops.merge_attn_states(parts[of], prefix[of], lse_a, suffix[of], lse_b)
    assert torch.equal(whole, parts)


def test_reshape_and_cache_flash() -> None:
    make = torch.Generator().manual_seed(2)
    key, value = (torch.randn(ROWS, 16, 128, generator=make) for _ in range(2))
    key_cache, value_cache = (torch.zeros(ROWS // 16, 16, 16, 128) for _ in range(2))
    slots = torch.randperm(ROWS, generator=make)
    slots[7] = -1
    one = torch.ones(1)
    kvcache_ops.reshape_and_cache_flash(key, value, key_cache, value_cache, slots, "auto", one, one)
    for rows, cache in ((key, key_cache), (value, value_cache)):
        expected = torch.zeros_like(cache).flatten(0, 1)
        expected[slots[slots >= 0]] = rows[slots >= 0]
        assert torch.equal(cache.flatten(0, 1), expected)


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8_e4m3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_reshape_and_cache(dtype: torch.dtype, kv_dtype: str) -> None:
    rows = ROWS if dtype == torch.float32 else 2 * ROWS
    make = torch.Generator().manual_seed(3)
    key, value = (torch.randn(rows, 16, 128, generator=make).to(dtype) for _ in range(2))
    stored = dtype if kv_dtype == "auto" else torch.uint8
    x = 16 // stored.itemsize
    shapes = (rows // 16 + 1, 16, 128 // x, 16, x), (rows // 16 + 1, 16, 128, 16)
    whole, parts = ([torch.zeros(s, dtype=stored) for s in shapes] for _ in range(2))
    blocks = torch.randperm(rows // 16 + 1, generator=make)[: rows // 16]
    slots = (blocks.unsqueeze(1) * 16 + torch.arange(16)).flatten()
    slots[7] = -1  # one block that is not filled
    scale = torch.tensor([0.3])
    rest = (kv_dtype, scale, scale)
    kvcache_ops.reshape_and_cache(key, value, whole[0], whole[1], slots, *rest)
    for i in range(0, rows, PART):
        of = slice(i, i + PART)
        kvcache_ops.reshape_and_cache(key[of], value[of], parts[0], parts[1], slots[of], *rest)
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one, other)
