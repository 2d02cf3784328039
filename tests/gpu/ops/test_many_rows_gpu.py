"""Ops on rows enough for several waves of blocks, which prefetch what later ones will read,
and on few enough for the kernels that do nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import kvcache_ops
from kvcache_ops import reference
from tests.unit.ops.cases_gather import ds_mla_cache, tables
from tests.unit.ops.ops_checks import check
from tests.unit.ops.ops_maker import BF16, FLOATS, ONE_ULP, U8, Args, Case, Maker


def lengths(m: Maker, sequences: int, rows: int) -> tuple[list[int], list[int]]:
    """Of sequences that make up `rows`, some of them empty, and where each begins."""
    cuts = sorted(m.random.choice([0, m.random.randrange(rows)]) for _ in range(sequences - 1))
    ends = [*cuts, rows]
    lens = [b - a for a, b in zip([0, *cuts], ends, strict=True)]
    return lens, [m.random.choice([0, m.random.randrange(100)]) for _ in lens]


ROWS = [500, 520, 4000, 14000]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("sequences", [1, 5, 40])
@pytest.mark.parametrize("kv", ["auto", "fp8"])
@pytest.mark.parametrize("entry", [576, 64, 40])
def test_gather(rows: int, sequences: int, kv: str, entry: int) -> None:
    def build(m: Maker) -> Args:
        lens, starts = lengths(m, sequences, rows)
        maps = tables(m, lens, starts, 50, 64, 1)
        src = m.normal(50, 64, entry, dtype=BF16)
        return dict(
            src_cache=src if kv == "auto" else src.to(torch.float8_e4m3fn).view(U8),
            dst=m.poison(rows + 3, entry, dtype=BF16),
            **maps,
            token_to_seq=m.ints([b for b, n in enumerate(lens) for _ in range(n)], torch.int32),
            num_tokens=rows,
            kv_cache_dtype=kv,
            scale=m.floats(0.7),
        )

    def raw(m: Maker) -> Args:
        args = build(m)
        names = ("src_cache", "dst", "block_table", "cu_seq_lens", "seq_starts")
        return dict({name: args[name] for name in names}, batch_size=sequences)

    check(Case("gather_and_maybe_dequant_cache", "", build, rows), "cuda")
    if kv == "auto":
        check(Case("cp_gather_cache", "", raw, rows), "cuda")


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("sequences", [1, 5, 40])
@pytest.mark.parametrize("host", [False, True])
def test_upconvert(rows: int, sequences: int, host: bool) -> None:
    def build(m: Maker) -> Args:
        lens, starts = lengths(m, sequences, rows)
        maps = tables(m, lens, starts, 50, 64, 1)
        args = dict(
            src_cache=ds_mla_cache(m, 50, 64),
            dst=m.poison(rows, 576, dtype=BF16),
            block_table=maps["block_table"],
            workspace_starts=maps["cu_seq_lens"][:-1].clone(),
            batch_size=sequences,
            seq_starts=maps["seq_starts"],
        )
        if host:
            cache = ds_mla_cache(Maker(99, torch.device("cpu")), 1, 4)[0].contiguous()
            args["host_cache"] = cache.pin_memory()
            ids = [m.random.randrange(-2, 3200) for _ in range(3200)]
            args["device_row_ids"] = m.ints(ids, torch.int32)
            args["host_row_ids"] = m.ints([m.random.randrange(5) for _ in ids], torch.int32)
        return args

    check(Case("cp_gather_and_upconvert_fp8_kv_cache", "", build, rows, 0.001), "cuda")


@pytest.mark.parametrize("captured", [False, True])
def test_gather_of_what_the_kernel_before_it_writes(captured: bool) -> None:
    """The entries; and a little earlier the table, which is read before that kernel has ended, but
    only to ask for memory."""
    torch.manual_seed(0)
    blocks, rows = 512, 512 * 64
    values = torch.randn(2, blocks, 64, 576, device="cuda", dtype=BF16)
    orders = [torch.randperm(blocks, device="cuda").int().view(4, -1) for _ in range(2)]
    table, out = orders[0].clone(), torch.empty(rows, 576, device="cuda", dtype=BF16)
    cache = torch.zeros(blocks, 64, 576, device="cuda", dtype=U8)
    cu = torch.arange(0, rows + 1, rows // 4, device="cuda", dtype=torch.int32)
    seq = torch.arange(4, device="cuda", dtype=torch.int32).repeat_interleave(rows // 4)
    one = torch.ones(1, device="cuda")
    which = torch.zeros((), device="cuda", dtype=torch.int64)
    chosen, order = values[0].clone(), torch.stack(orders)

    def step() -> None:
        chosen.copy_(values.index_select(0, which.view(1))[0])
        table.copy_(order.index_select(0, which.view(1))[0])
        kvcache_ops.convert_fp8(cache, chosen, 1.0, "fp8")
        kvcache_ops.gather_and_maybe_dequant_cache(cache, out, table, cu, seq, rows, "fp8", one)
        kvcache_ops.gather_and_maybe_dequant_cache(cache, out, table, cu, seq, rows, "fp8", one)

    graph = torch.cuda.CUDAGraph()
    if captured:
        step()
        with torch.cuda.graph(graph):
            step()
    for i in range(20):
        which.fill_(i % 2)
        graph.replay() if captured else step()
        codes = values[i % 2].to(torch.float8_e4m3fn).view(U8)[orders[i % 2].flatten()]
        assert torch.equal(out, codes.view(torch.float8_e4m3fn).view(rows, 576).to(BF16))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", [64, 150])
@pytest.mark.parametrize("heads", [(4, 1), (64, 8), (70, 0)])
@pytest.mark.parametrize("layout", ["dense", "sliced", "partial"])
def test_rotary(dtype: torch.dtype, tokens: int, heads: tuple[int, int], layout: str) -> None:
    def build(m: Maker) -> Args:
        width = 128 + (64 if layout == "partial" else 0)
        qkv = m.normal(tokens, (heads[0] + heads[1] + 1) * width, dtype=dtype)
        query, key = qkv[:, : heads[0] * width], qkv[:, heads[0] * width : sum(heads) * width]
        if layout == "dense":
            query, key = query.contiguous(), key.contiguous()
        return dict(
            positions=m.ints([m.random.randrange(500) for _ in range(tokens)]),
            query=query,
            key=key if heads[1] else None,
            head_size=width,
            cos_sin_cache=m.normal(500, 128, dtype=dtype, std=0.7),
            is_neox=tokens == 64,
            rope_dim_offset=64 if layout == "partial" else 0,
        )

    check(Case("rotary_embedding", "", build, tokens, 1.0, ONE_ULP[dtype] / 2), "cuda")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("keys", [0, 8])
def test_rotary_has_the_same_bits_of_much_and_of_little(
    dtype: torch.dtype, neox: bool, keys: int
) -> None:
    """More than the L2 holds is read ahead of time."""
    torch.manual_seed(0)
    tokens, put = 4100, dict[str, Any](device="cuda", dtype=dtype)
    query, cos_sin = torch.randn(tokens, 72 * 128, **put), torch.randn(300, 128, **put)
    key = torch.randn(tokens, 8 * 128, **put) if keys else None
    positions = torch.randint(0, 310, (tokens,), device="cuda")  # some past the table
    parts = (query.clone(), None if key is None else key.clone())
    kvcache_ops.rotary_embedding(positions, query, key, 128, cos_sin, neox)
    for first in range(0, tokens, 500):
        rows = slice(first, first + 500)
        q, k = (None if x is None else x[rows] for x in parts)
        kvcache_ops.rotary_embedding(positions[rows], q, k, 128, cos_sin, neox)
    assert torch.equal(query, parts[0])
    assert key is None or torch.equal(key, parts[1])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [2048 * 1536, 2048 * 1537, 5_000_016, 5_000_003])
@pytest.mark.parametrize("first", [0, 16, 1])
def test_convert_from_fp8(dtype: torch.dtype, n: int, first: int) -> None:
    torch.manual_seed(0)
    codes = torch.randint(0, 126, (n + first,), device="cuda", dtype=U8)[first:]
    got, want = torch.empty(2, n, device="cuda", dtype=dtype)
    kvcache_ops.convert_fp8(got, codes, 0.7)
    reference.convert_fp8(want, codes, 0.7)
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_silu_of_every_16_bit_value_in_single_rows(dtype: torch.dtype) -> None:
    """A row in whole blocks has a kernel of its own."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).cuda()
    for row in x.view(8, -1):
        out = torch.empty_like(row)
        kvcache_ops.silu_and_mul(out, torch.cat([row, torch.ones_like(row)]))
        expected = F.silu(row) * 1
        ordinary = ~expected.isnan()
        assert torch.equal(out.isnan(), ~ordinary)
        assert torch.equal(out[ordinary].view(torch.int16), expected[ordinary].view(torch.int16))


@pytest.mark.parametrize("op", ["silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("d", [256, 14336, 16128, 16384, 14400])
def test_an_activation_has_the_same_bits_in_one_row_and_many(
    op: str, dtype: torch.dtype, d: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 2 * d, device="cuda").to(dtype)
    many, one = (torch.empty(n, d, device="cuda", dtype=dtype) for n in (40, 1))
    getattr(kvcache_ops, op)(many, x)
    for i in (0, 17, 39):
        getattr(kvcache_ops, op)(one, x[i : i + 1])
        assert torch.equal(one[0], many[i])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 40])
@pytest.mark.parametrize("layout", ["NHD", "HND", "mixed", "page-padded"])
@pytest.mark.parametrize("heads", [1, 8, 40])
def test_flash_cache_of_a_few_tokens(
    dtype: torch.dtype, tokens: int, layout: str, heads: int
) -> None:
    def build(m: Maker) -> Args:
        def cache(swapped: bool) -> torch.Tensor:
            if swapped:
                return m.poison(6, heads, 16, 128, dtype=dtype).transpose(1, 2)
            if layout == "page-padded":
                return m.poison(6, 17, heads + 1, 128, dtype=dtype)[:, :16, :heads]
            return m.poison(6, 16, heads, 128, dtype=dtype)

        slots = m.slots(tokens, 6, 16)
        slots[tokens // 2] = 96 if tokens > 2 else slots[tokens // 2]  # past the cache
        qkv = m.poison(tokens, 3 * heads, 128, dtype=dtype)
        return dict(
            key=qkv[:, heads : 2 * heads],
            value=m.poison(tokens, heads, 128, dtype=dtype),
            key_cache=cache(layout in ("HND", "mixed")),
            value_cache=cache(layout == "HND"),
            slot_mapping=slots,
            kv_cache_dtype="auto",
            k_scale=m.floats(1.0),
            v_scale=m.floats(1.0),
        )

    check(Case("reshape_and_cache_flash", "", build, tokens), "cuda")
