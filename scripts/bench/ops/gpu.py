"""What the case ops times on a GPU: each makes one set of arguments, fresh ones for every call.

`bytes` are those that must be read and written once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Args = dict[str, Any]
BF16, U8, I32, I64 = torch.bfloat16, torch.uint8, torch.int32, torch.int64


@dataclass(frozen=True)
class BenchCase:
    op: str
    name: str
    make: Callable[[], Args]
    bytes: int
    bar_us: float  # the project's own limit on one H200
    outputs: tuple[str, ...]
    rtol: float = 0.0


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=BF16)


def codes(*shape: int) -> Tensor:
    """Finite e4m3 codes of ordinary values."""
    return torch.randn(*shape, device="cuda").to(torch.float8_e4m3fn).view(U8)


def ints(values: Any, dtype: torch.dtype = I32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device="cuda")


def one() -> Tensor:
    return torch.full((1,), 0.7, device="cuda")


def prefill_slots(tokens: int) -> Tensor:
    return torch.arange(tokens, device="cuda", dtype=I64) + 64


def norm_cases() -> list[BenchCase]:
    cases = []
    for hidden, bars in ((8192, (65.0, 133.0)), (4096, (34.4, 67.2))):
        n = 8192 * hidden * 2

        def plain(hidden: int = hidden) -> Args:
            x, w = randn(8192, hidden), randn(hidden)
            return dict(out=torch.empty_like(x), input=x, weight=w, epsilon=1e-5)

        def fused(hidden: int = hidden) -> Args:
            x, r = randn(8192, hidden), randn(8192, hidden)
            return dict(input=x, residual=r, weight=randn(hidden), epsilon=1e-5)

        name = f"8192x{hidden}"
        cases.append(BenchCase("rms_norm", name, plain, 2 * n, bars[0], ("out",), 2**-7))
        cases.append(
            BenchCase(
                "fused_add_rms_norm", name, fused, 4 * n, bars[1], ("input", "residual"), 2**-7
            )
        )
    return cases


def elementwise_cases() -> list[BenchCase]:
    cases = norm_cases()

    def rotary() -> Args:
        return dict(
            positions=torch.randint(0, 8192, (8192,), device="cuda"),
            query=randn(8192, 64 * 128),
            key=randn(8192, 8 * 128),
            head_size=128,
            cos_sin_cache=randn(8192, 128),
            is_neox=True,
        )

    rotated = 8192 * 72 * 128 * 2 * 2
    cases.append(
        BenchCase("rotary_embedding", "8192x(64+8)", rotary, rotated, 76, ("query", "key"), 2**-6)
    )
    extra = {"fatrelu_and_mul": {"threshold": 0.3}, "swigluoai_and_mul": {}}
    for op in ("silu_and_mul", "mul_and_silu", "gelu_and_mul", "gelu_tanh_and_mul", *extra):

        def gated(op: str = op) -> Args:
            x = randn(8192, 28672)
            out = torch.empty(8192, 14336, device="cuda", dtype=BF16)
            return {
                "result" if op == "silu_and_mul" else "out": out,
                "input": x,
                **extra.get(op, {}),
            }

        name = "result" if op == "silu_and_mul" else "out"
        cases.append(BenchCase(op, "8192x28672", gated, 8192 * 14336 * 6, 162, (name,), 2**-6))
    return cases


def write_cases() -> list[BenchCase]:
    cases = []
    t, h, d, bs, nb = 8192, 8, 128, 16, 1024
    for kv, flash_bar, packed_bar in (("auto", 18.0, 28.0), ("fp8", 13.0, 22.0)):
        dt = BF16 if kv == "auto" else U8
        moved = 2 * t * h * d * (2 + dt.itemsize)

        def flash(kv: str = kv, dt: torch.dtype = dt) -> Args:
            return dict(
                key=randn(t, h, d),
                value=randn(t, h, d),
                key_cache=torch.zeros(nb, bs, h, d, device="cuda", dtype=dt),
                value_cache=torch.zeros(nb, bs, h, d, device="cuda", dtype=dt),
                slot_mapping=prefill_slots(t),
                kv_cache_dtype=kv,
                k_scale=one(),
                v_scale=one(),
            )

        def packed(kv: str = kv, dt: torch.dtype = dt) -> Args:
            x = 16 // dt.itemsize
            return dict(
                flash(kv, dt),
                key_cache=torch.zeros(nb, h, d // x, bs, x, device="cuda", dtype=dt),
                value_cache=torch.zeros(nb, h, d, bs, device="cuda", dtype=dt),
            )

        out = ("key_cache", "value_cache")
        cases.append(BenchCase("reshape_and_cache_flash", kv, flash, moved, flash_bar, out))
        cases.append(BenchCase("reshape_and_cache", kv, packed, moved, packed_bar, out))

    def mla(kv: str, entry: int, dt: torch.dtype) -> Args:
        return dict(
            kv_c=randn(t, 512),
            k_pe=randn(t, 64),
            kv_cache=torch.zeros(nb, bs, entry, device="cuda", dtype=dt),
            slot_mapping=prefill_slots(t),
            kv_cache_dtype=kv,
            scale=one(),
        )

    for kv, entry, dt, bar in (
        ("auto", 576, BF16, 5.6),
        ("fp8", 576, U8, 5.5),
        ("fp8_ds_mla", 656, U8, 6.0),
    ):
        moved = t * (1152 + entry * dt.itemsize)

        def build(kv: str = kv, entry: int = entry, dt: torch.dtype = dt) -> Args:
            return mla(kv, entry, dt)

        cases.append(BenchCase("concat_and_cache_mla", kv, build, moved, bar, ("kv_cache",)))

    def fused() -> Args:
        args = mla("auto", 576, BF16)
        args.pop("scale")
        return dict(
            args,
            positions=torch.randint(0, 8192, (t,), device="cuda"),
            q_pe=randn(t, 128, 64),
            cos_sin_cache=randn(8192, 64),
            is_neox=True,
            kv_cache_scale=one(),
        )

    moved = t * (128 * 64 * 4 + 1152 * 2 + 128)
    cases.append(
        BenchCase(
            "concat_and_cache_mla_rope_fused",
            "128 heads",
            fused,
            moved,
            78,
            ("q_pe", "k_pe", "kv_cache"),
            2**-6,
        )
    )

    def indexer() -> Args:
        return dict(
            k=randn(t, 128),
            kv_cache=torch.zeros(nb // 4, 64, 132, device="cuda", dtype=U8),
            slot_mapping=prefill_slots(t),
            quant_block_size=128,
            kv_cache_dtype="ue8m0",
        )

    moved = t * (256 + 132)
    cases.append(BenchCase("indexer_k_quant_and_cache", "8192", indexer, moved, 3.6, ("kv_cache",)))
    return cases


def gather_cases() -> list[BenchCase]:
    n, batch, bs = 65536, 16, 64
    each = n // batch
    nb = n // bs + 64

    def maps() -> Args:
        order = torch.randperm(nb, device="cuda")[: n // bs].to(I32)
        return dict(
            block_table=order.view(batch, each // bs),
            cu_seq_lens=torch.arange(0, n + 1, each, device="cuda", dtype=I32),
        )

    def dequant(kv: str) -> Args:
        src = randn(nb, bs, 576) if kv == "auto" else codes(nb, bs, 576)
        return dict(
            maps(),
            src_cache=src,
            dst=torch.empty(n, 576, device="cuda", dtype=BF16),
            token_to_seq=torch.arange(batch, device="cuda", dtype=I32).repeat_interleave(each),
            num_tokens=n,
            kv_cache_dtype=kv,
            scale=one(),
        )

    def raw() -> Args:
        dst = torch.empty(n, 576, device="cuda", dtype=BF16)
        return dict(maps(), src_cache=randn(nb, bs, 576), dst=dst, batch_size=batch)

    def upconvert() -> Args:
        m = maps()
        src = torch.randint(0, 120, (nb, bs, 656), device="cuda", dtype=U8)
        src[..., 512:528] = torch.rand(nb, bs, 4, device="cuda").view(U8)
        dst = torch.empty(n, 576, device="cuda", dtype=BF16)
        starts = m["cu_seq_lens"][:-1].contiguous()
        table = m["block_table"]
        return dict(
            src_cache=src, dst=dst, block_table=table, workspace_starts=starts, batch_size=batch
        )

    def indexer() -> Args:
        return dict(
            maps(),
            kv_cache=codes(nb, bs, 132),
            dst_k=torch.empty(n, 128, device="cuda", dtype=U8),
            dst_scale=torch.empty(n, 4, device="cuda", dtype=U8),
        )

    gather = "gather_and_maybe_dequant_cache"
    upconvert_op = "cp_gather_and_upconvert_fp8_kv_cache"
    return [
        BenchCase(gather, "auto", lambda: dequant("auto"), n * 576 * 4, 41, ("dst",)),
        BenchCase(gather, "fp8", lambda: dequant("fp8"), n * 576 * 3, 31, ("dst",)),
        BenchCase("cp_gather_cache", "65536", raw, n * 576 * 4, 43, ("dst",)),
        BenchCase(upconvert_op, "65536", upconvert, n * (656 + 1152), 32, ("dst",)),
        BenchCase(
            "cp_gather_indexer_k_quant_cache", "65536", indexer, n * 264, 7, ("dst_k", "dst_scale")
        ),
    ]


def other_cases() -> list[BenchCase]:
    n = 1 << 26

    def to_fp8() -> Args:
        return dict(output=torch.empty(n, device="cuda", dtype=U8), input=randn(n), scale=0.7)

    def from_fp8() -> Args:
        return dict(output=torch.empty(n, device="cuda", dtype=BF16), input=codes(n), scale=0.7)

    def merge() -> Args:
        lse = [torch.randn(64, 8192, device="cuda") for _ in range(3)]
        return dict(
            output=torch.empty(8192, 64, 128, device="cuda", dtype=BF16),
            prefix_output=randn(8192, 64, 128),
            prefix_lse=lse[0],
            suffix_output=randn(8192, 64, 128),
            suffix_lse=lse[1],
            output_lse=lse[2],
        )

    moved = 8192 * 64 * (128 * 6 + 12)
    return [
        BenchCase("convert_fp8", "to", to_fp8, 3 * n, 48.5, ("output",)),
        BenchCase("convert_fp8", "from", from_fp8, 3 * n, 50, ("output",)),
        BenchCase("merge_attn_states", "8192x64x128", merge, moved, 95, ("output",), 2**-6),
    ]


def attention_cases() -> list[BenchCase]:
    cases = []
    bars = {
        "auto": (12.3, 134.0, 71.0, 492.0, 502.0),
        "fp8": (13.0, 90.0, 55.0, 350.0, 370.0),
    }
    shapes = ((1, 4096), (1, 131072), (16, 4096), (64, 8192), (256, 2048))
    for kv, limits in bars.items():
        for (s, n), bar in zip(shapes, limits, strict=True):

            def make(kv: str = kv, s: int = s, n: int = n) -> Args:
                bs, h, d = 16, 8, 128
                nb = s * n // bs
                cache = [randn(nb, bs, h, d) if kv == "auto" else codes(nb, bs, h, d) for _ in "kv"]
                scales = {} if kv == "auto" else dict(k_scale=one(), v_scale=one())
                return dict(
                    out=torch.empty(s, 64, d, device="cuda", dtype=BF16),
                    query=randn(s, 64, d),
                    key_cache=cache[0],
                    value_cache=cache[1],
                    block_tables=torch.randperm(nb, device="cuda").to(I32).view(s, -1),
                    seq_lens=torch.full((s,), n, device="cuda", dtype=I32),
                    scale=d**-0.5,
                    kv_cache_dtype=kv,
                    **scales,
                )

            moved = 2 * s * n * 8 * 128 * (2 if kv == "auto" else 1)
            cases.append(
                BenchCase("paged_attention", f"{kv} {s}x{n}", make, moved, bar, ("out",), 2**-6)
            )
    return cases


def all_cases() -> list[BenchCase]:
    return [
        *elementwise_cases(),
        *write_cases(),
        *gather_cases(),
        *other_cases(),
        *attention_cases(),
    ]
