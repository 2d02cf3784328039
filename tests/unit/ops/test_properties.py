"""Every family of ops on shapes, strides and slots that hypothesis draws, against the reference.

Outputs are poisoned and lie inside a larger poisoned memory, all of which is compared: what must
not be written is not. The examples are the same in every run.
"""

from __future__ import annotations

import math

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.ops.ops_checks import check
from tests.unit.ops.ops_maker import BF16, F32, ONE_ULP, U8, Args, Case, Maker
from tests.unit.ops.shapes import (
    block_sizes,
    dtypes,
    formats,
    frames,
    head_counts,
    head_sizes,
    seeds,
    slot_lists,
)

settings.register_profile(
    "ops",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=120,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ops")


def cache_dtype(dtype: torch.dtype, kv: str) -> torch.dtype:
    return dtype if kv == "auto" else U8


@given(st.data())
def test_flash_cache_writes(data: st.DataObject) -> None:
    draw = data.draw
    h, d, nb, bs = draw(head_counts), draw(head_sizes), draw(st.integers(1, 4)), draw(block_sizes)
    dtype, kv, per_head = draw(dtypes), draw(formats), draw(st.booleans())
    slots, padding = draw(slot_lists(nb * bs)), draw(st.integers(0, 2))
    rows = [draw(frames(3, dense_from=1)) for _ in range(2)]
    caches = [draw(frames(4, permuted=True)) for _ in range(2)]

    def build(m: Maker) -> Args:
        n = len(slots) + padding
        key, value = (f.normal(m, (n, h, d), dtype) for f in rows)
        key_cache, value_cache = (f.view(m, (nb, bs, h, d), cache_dtype(dtype, kv)) for f in caches)
        scales = [0.3 + 0.1 * i for i in range(h if per_head else 1)]
        return dict(
            key=key,
            value=value,
            key_cache=key_cache,
            value_cache=value_cache,
            slot_mapping=m.ints(slots),
            kv_cache_dtype=kv,
            k_scale=m.floats(*scales),
            v_scale=m.floats(*reversed(scales)),
        )

    check(Case("reshape_and_cache_flash", f"{h} {d} {nb} {bs} {dtype} {kv}", build, draw(seeds)))


@given(st.data())
def test_packed_cache_writes(data: st.DataObject) -> None:
    draw = data.draw
    dtype, kv = draw(dtypes), draw(formats)
    x = 16 // cache_dtype(dtype, kv).itemsize
    h, d = draw(head_counts), x * draw(st.integers(1, 128 // x))
    nb, bs, interleaved = draw(st.integers(1, 4)), draw(block_sizes), draw(st.booleans())
    interleaved = interleaved and bs % x == 0
    # Runs of slots side by side are written together: draw some.
    first, length = draw(st.integers(0, nb * bs - 1)), draw(st.integers(0, 40))
    run = list(range(first, min(first + length, nb * bs)))
    slots = draw(st.one_of(st.just(run), slot_lists(nb * bs)))
    if run and slots is run:
        for i in draw(st.lists(st.integers(0, len(run) - 1), max_size=3)):
            slots[i] = -1
    rows = [draw(frames(3, dense_from=1)) for _ in range(2)]

    def build(m: Maker) -> Args:
        key, value = (f.normal(m, (len(slots) + 1, h, d), dtype) for f in rows)
        dt = cache_dtype(dtype, kv)
        return dict(
            key=key,
            value=value,
            key_cache=m.poison(nb * h * d * bs + 3, dtype=dt)[3:].view(nb, h, d // x, bs, x),
            value_cache=m.poison(nb * h * d * bs + 5, dtype=dt)[5:].view(nb, h, d, bs),
            slot_mapping=m.ints(slots),
            kv_cache_dtype=kv,
            k_scale=m.floats(0.6),
            v_scale=m.floats(2.1),
            interleaved_v=interleaved,
        )

    check(Case("reshape_and_cache", f"{h} {d} {nb} {bs} {dtype} {kv}", build, draw(seeds)))


@given(st.data())
def test_mla_cache_writes(data: st.DataObject) -> None:
    draw = data.draw
    dtype, kv, nb, bs = draw(dtypes), draw(formats), draw(st.integers(1, 4)), draw(block_sizes)
    latent, rope = draw(st.integers(1, 600)), 2 * draw(st.integers(1, 40))
    slots, heads = draw(slot_lists(nb * bs)), draw(st.integers(0, 5))
    fused, neox = draw(st.booleans()), draw(st.booleans())
    kv_c, k_pe, cache = (draw(frames(2)), draw(frames(2)), draw(frames(3, permuted=True)))
    q_pe, table = draw(frames(3, permuted=True)), draw(frames(2))

    def build(m: Maker) -> Args:
        n = len(slots)
        common = dict(
            kv_c=kv_c.normal(m, (n + 1, latent), dtype),
            k_pe=k_pe.normal(m, (n, rope), dtype),
            kv_cache=cache.view(m, (nb, bs, latent + rope), cache_dtype(dtype, kv)),
            slot_mapping=m.ints(slots),
            kv_cache_dtype=kv,
        )
        if not fused:
            return dict(common, scale=m.floats(0.4), skip_scale=neox)
        return dict(
            common,
            positions=m.ints([m.random.randrange(20) for _ in range(n + 2)]),
            q_pe=q_pe.normal(m, (n + 1, heads, rope), dtype),
            cos_sin_cache=table.normal(m, (20, rope), dtype),
            is_neox=neox,
            kv_cache_scale=m.floats(0.4),
        )

    op = "concat_and_cache_mla_rope_fused" if fused else "concat_and_cache_mla"
    # x c - y s may be contracted to one rounding less.
    bound = (1.0, 8 * ONE_ULP[dtype] if kv == "auto" else 0.02) if fused else (0.0, 0.0)
    check(Case(op, f"{latent} {rope} {nb} {bs} {dtype} {kv}", build, draw(seeds), *bound))


@given(st.data())
def test_gathers(data: st.DataObject) -> None:
    draw = data.draw
    dtype, kv, nb, bs = draw(dtypes), draw(formats), draw(st.integers(1, 5)), draw(block_sizes)
    entry, raw = draw(st.integers(1, 600)), draw(st.booleans())
    lens = draw(st.lists(st.integers(0, 20), min_size=1, max_size=4))
    starts = draw(st.lists(st.integers(0, 30), min_size=len(lens), max_size=len(lens)))
    # Blocks outside the cache, and tables too short for their sequences, leave rows alone.
    width = draw(st.integers(1, 6))
    blocks = st.one_of(st.integers(0, nb - 1), st.sampled_from((-1, nb, 1 << 30, -(1 << 31))))
    rows = st.lists(blocks, min_size=width, max_size=width)
    table = [draw(rows) for _ in lens]
    source, target = draw(frames(3, permuted=True)), draw(frames(2))

    def build(m: Maker) -> Args:
        total = sum(lens)
        cu = [sum(lens[:i]) for i in range(len(lens) + 1)]
        dt = dtype if raw else cache_dtype(dtype, kv)
        args = dict(
            src_cache=source.view(m, (nb, bs, entry), dt),
            dst=target.view(m, (total + 2, entry), dtype),
            block_table=m.ints(table, torch.int32),
            cu_seq_lens=m.ints(cu, torch.int32),
            seq_starts=m.ints(starts, torch.int32) if any(starts) else None,
        )
        if raw:
            return dict(args, batch_size=len(lens))
        sequences = [b for b, n in enumerate(lens) for _ in range(n)]
        return dict(
            args,
            token_to_seq=m.ints(sequences, torch.int32),
            num_tokens=total,
            kv_cache_dtype=kv,
            scale=m.floats(0.7),
        )

    op = "cp_gather_cache" if raw else "gather_and_maybe_dequant_cache"
    ulps = 0.0 if raw or kv == "auto" else 0.001  # of a NaN only that it is one
    check(Case(op, f"{lens} {starts} {nb} {bs} {entry} {dtype} {kv}", build, draw(seeds), ulps))


@given(st.data())
def test_norms(data: st.DataObject) -> None:
    draw = data.draw
    shape = tuple(draw(st.lists(st.integers(0, 4), min_size=1, max_size=3)))
    shape += (draw(st.one_of(st.integers(1, 130), st.sampled_from((1024, 4096)))),)
    dtype, fused, weights = draw(dtypes), draw(st.booleans()), draw(st.sampled_from("rgn"))
    x, residual, w = (draw(frames(len(shape), permuted=True)) for _ in range(3))

    def build(m: Maker) -> Args:
        weight = None
        if weights != "n":
            rows = (shape[-1],) if weights == "r" else (shape[0], shape[-1])
            weight = m.normal(*rows, dtype=dtype)
        args: Args = dict(input=x.normal(m, shape, dtype), weight=weight, epsilon=1e-5)
        if fused:
            return dict(args, residual=residual.normal(m, shape, dtype))
        whole = m.poison(w.before + math.prod(shape) + 3, dtype=dtype)
        out = whole[w.before : w.before + math.prod(shape)].view(shape)
        return dict(args, out=out)

    op = "fused_add_rms_norm" if fused else "rms_norm"
    check(Case(op, f"{shape} {dtype} {weights}", build, draw(seeds), 1.0, 1e-6))


@given(st.data())
def test_rotary_embedding(data: st.DataObject) -> None:
    draw = data.draw
    dtype, table = draw(dtypes), draw(dtypes)
    hk, groups, n = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(0, 6))
    rot, before, after = (
        2 * draw(st.integers(1, 70)),
        draw(st.integers(0, 9)),
        draw(st.integers(0, 9)),
    )
    with_key, neox, inverse = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    q, k, c = draw(frames(3, permuted=True)), draw(frames(3, permuted=True)), draw(frames(2))
    d = rot + before + after

    def build(m: Maker) -> Args:
        return dict(
            positions=m.ints([m.random.randrange(30) for _ in range(n)]),
            query=q.normal(m, (n, hk * groups, d), dtype),
            key=k.normal(m, (n, hk, d), dtype) if with_key else None,
            head_size=d,
            cos_sin_cache=c.normal(m, (30, rot), table),
            is_neox=neox,
            rope_dim_offset=before,
            inverse=inverse,
        )

    # x c - y s cancels: the error is relative to the operands.
    atol = 4 * ONE_ULP[dtype]
    check(Case("rotary_embedding", f"{hk} {groups} {n} {d}", build, draw(seeds), 1.0, atol))


@given(st.data())
def test_activations(data: st.DataObject) -> None:
    draw = data.draw
    ops: dict[str, Args] = {
        "silu_and_mul": {},
        "mul_and_silu": {},
        "gelu_and_mul": {},
        "gelu_tanh_and_mul": {},
        "fatrelu_and_mul": {"threshold": 0.3},
        "swigluoai_and_mul": {"alpha": 1.7, "limit": 1.5},
    }
    op, dtype = draw(st.sampled_from(sorted(ops))), draw(dtypes)
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    d, before = draw(st.one_of(st.integers(0, 90), st.just(4100))), draw(st.integers(0, 7))

    def build(m: Maker) -> Args:
        n = math.prod(shape) * d
        x = m.normal(2 * n + 7, dtype=dtype, std=3.0)[7 - before : 7 - before + 2 * n]
        out = m.poison(n + 16, dtype=dtype)[before : before + n].view(*shape, d)
        name = "result" if op == "silu_and_mul" else "out"
        return {name: out, "input": x.view(*shape, 2 * d), **ops[op]}

    check(Case(op, f"{shape} {d} {dtype}", build, draw(seeds), 2.0, 1e-6 if dtype == F32 else 1e-7))


@given(st.data())
def test_decode_attention(data: st.DataObject) -> None:
    draw = data.draw
    dtype, kv, bs = draw(dtypes), draw(formats), draw(block_sizes)
    hkv, groups = draw(st.integers(1, 4)), draw(st.sampled_from((1, 2, 3, 4, 8)))
    d, alibi = 8 * draw(st.integers(1, 32)), draw(st.booleans())
    lens = draw(st.lists(st.integers(0, 90), min_size=1, max_size=3))
    q, k, v, lse = (
        draw(frames(3, permuted=True)),
        draw(frames(4, permuted=True)),
        draw(frames(4, permuted=True)),
        draw(frames(2, dense_from=2, permuted=True)),
    )

    def build(m: Maker) -> Args:
        needed = [-(-n // bs) for n in lens]
        nb = sum(needed) + 1
        free = m.random.sample(range(nb), nb)
        table = [[-5] * (max(needed) + 1) for _ in lens]
        for row, count in zip(table, needed, strict=True):
            row[:count] = [free.pop() for _ in range(count)]
        caches = [f.normal(m, (nb, bs, hkv, d), cache_dtype(dtype, kv)) for f in (k, v)]
        for cache in caches:  # slots that no sequence uses hold NaN
            for row, n in zip(table, lens, strict=True):
                if n % bs:
                    cache[row[n // bs], n % bs :] = 0x7F if cache.dtype == U8 else math.nan
        scales = None if kv == "auto" else m.floats(0.7)
        return dict(
            out=m.poison(len(lens), hkv * groups, d, dtype=dtype),
            query=q.normal(m, (len(lens), hkv * groups, d), dtype),
            key_cache=caches[0],
            value_cache=caches[1],
            block_tables=m.ints(table, torch.int32),
            seq_lens=m.ints(lens, torch.int32),
            scale=d**-0.5,
            out_lse=lse.view(m, (hkv * groups, len(lens)), F32),
            alibi_slopes=m.normal(hkv * groups, std=0.1) if alibi else None,
            kv_cache_dtype=kv,
            k_scale=scales,
            v_scale=scales,
        )

    atol = 6e-5 if dtype == F32 else 1.5 * ONE_ULP[dtype]
    name = f"{lens} {hkv} {groups} {d} {bs} {dtype} {kv}"
    check(Case("paged_attention", name, build, draw(seeds), 2.0, atol))


@given(st.data())
def test_merge_of_attention_states(data: st.DataObject) -> None:
    draw = data.draw
    n, h, d, dtype = draw(st.integers(0, 6)), draw(head_counts), draw(head_sizes), draw(dtypes)
    split = draw(st.one_of(st.none(), st.integers(0, n)))
    codes, with_lse = draw(st.booleans()), draw(st.booleans())
    out, prefix, suffix = (draw(frames(3, permuted=True)) for _ in range(3))
    # Their last dimension may have gaps too.
    lses = [draw(frames(2, dense_from=2, permuted=True)) for _ in range(3)]

    def build(m: Maker) -> Args:
        p, s = (f.normal(m, (h, n), F32) for f in lses[:2])
        for t, value in ((p, -math.inf), (s, -math.inf), (p, math.inf)):
            if n:
                t[m.random.randrange(h), m.random.randrange(n)] = value
        return dict(
            output=out.view(m, (n, h, d), U8 if codes else dtype),
            prefix_output=prefix.normal(m, (n, h, d), dtype),
            prefix_lse=p,
            suffix_output=suffix.normal(m, (n, h, d), dtype),
            suffix_lse=s,
            output_lse=lses[2].view(m, (h, n), F32) if with_lse else None,
            prefill_tokens_with_context=split,
            output_scale=m.floats(0.37) if codes else None,
        )

    name = f"{n} {h} {d} {dtype} {split} {codes}"
    check(Case("merge_attn_states", name, build, draw(seeds), 1.5, ONE_ULP[dtype]))


@given(st.data())
def test_conversions(data: st.DataObject) -> None:
    draw = data.draw
    n, dtype, before = draw(st.integers(0, 9000)), draw(dtypes), draw(st.integers(0, 7))
    kv, to_codes = draw(st.sampled_from(("fp8", "fp8_e4m3", "fp8_e5m2"))), draw(st.booleans())
    scale = draw(st.sampled_from((1.0, 0.37, 1e-3, 250.0)))

    def build(m: Maker) -> Args:
        floats = m.poison(n + 9, dtype=dtype)[before : before + n]
        codes = m.poison(n + 9, dtype=U8)[8 - before : 8 - before + n]
        output, given = (codes, floats) if to_codes else (floats, codes)
        return dict(output=output, input=given, scale=scale, kv_dtype=kv)

    ulps = 0.0 if to_codes else 0.001  # of a NaN only that it is one
    check(Case("convert_fp8", f"{n} {dtype} {kv} {to_codes}", build, draw(seeds), ulps))


@given(st.data())
def test_indexer_cache(data: st.DataObject) -> None:
    draw = data.draw
    group, nb, bs = draw(st.sampled_from((32, 64, 128))), draw(st.integers(1, 4)), draw(block_sizes)
    d = group * draw(st.integers(1, 3))
    scales = draw(st.sampled_from(("ue8m0", "mxfp8", "fp32", "auto")))
    slots, cache = draw(slot_lists(nb * bs)), draw(frames(3, dense_from=1))

    def build(m: Maker) -> Args:
        return dict(
            k=m.normal(len(slots) + 1, d, dtype=BF16, std=10.0),
            kv_cache=cache.view(m, (nb, bs, d + 4 * d // group), U8),
            slot_mapping=m.ints(slots),
            quant_block_size=group,
            kv_cache_dtype=scales,
        )

    name = f"{d} {group} {nb} {bs} {scales}"
    check(Case("indexer_k_quant_and_cache", name, build, draw(seeds)))
