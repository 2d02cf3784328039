"""The kvcache ops on one GPU: results checked against the references first, then CUDA graphs of
calls over rotated arguments, so that the data come from device memory.

A graph is queued whole before its time begins. Medians, in us, with the share of the
device-to-device copy rate that the same run measured, the project's own limit, and the plain-torch
reference beside. `--latency` times one token, added between two other kernels, and `--swap`
swap_blocks over the host link.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import kvcache_ops
from communicators.cli.bench.record import Record, Row
from communicators.errors import TopologyError
from communicators.selection.timing import queued_us
from kvcache_ops import reference

from ..ops.gpu import BF16, Args, BenchCase, all_cases

OURS = ("ours",)
L2_BYTES = 64 << 20
CALLED_BYTES = 6 << 30  # by a graph of calls: 1.5 ms or more, beside which its own launch is little
WARM = 3


def median_us(run: Callable[[], Any], repeats: int = 15) -> float:
    """The GPU's time for what `run` queues."""
    return statistics.median([queued_us(run) for _ in range(repeats + WARM)][WARM:])


def graph_of(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def copy_rate() -> float:
    """Bytes read and written a microsecond by eager copies of 512 MB: the ceiling. (Captured, the
    same copy is a memcpy node, and slower.)"""
    pairs = [
        [torch.empty(512 << 20, dtype=torch.uint8, device="cuda").random_() for _ in range(2)]
        for _ in range(2)
    ]

    def copies() -> None:
        for to, source in pairs:
            to.copy_(source)
            source.copy_(to)

    return 8 * (512 << 20) / median_us(copies)


def check(case: BenchCase, args: Args) -> None:
    expected = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    for name in case.outputs:
        if args[name].dtype.is_floating_point and name in ("out", "result", "output", "dst"):
            args[name].fill_(float("nan"))
    getattr(kvcache_ops, case.op)(**args)
    getattr(reference, case.op)(**expected)
    for name in case.outputs:
        got, want = args[name], expected[name]
        if case.rtol == 0.0:
            if not torch.equal(got, want):
                raise AssertionError(f"{case.op} {case.name}: {name} differs from the reference")
        else:
            torch.testing.assert_close(got, want, rtol=case.rtol, atol=case.rtol / 2)


def time_case(case: BenchCase) -> tuple[float, float | None]:
    """(us of the op, us of the reference where it is timed)."""
    sets = [case.make() for _ in range(max(2, min(12, -(-3 * L2_BYTES // case.bytes))))]
    check(case, sets[0])
    op = getattr(kvcache_ops, case.op)
    rounds = max(1, min(64, CALLED_BYTES // case.bytes) // len(sets))

    def calls() -> None:
        for _ in range(rounds):
            for args in sets:
                op(**args)

    graph = graph_of(calls)
    ours = median_us(graph.replay) / (rounds * len(sets))
    plain = None
    if case.op not in ("paged_attention",) and "gather" not in case.op:
        plain = median_us(lambda: getattr(reference, case.op)(**sets[1]), 3)
    return ours, plain


def each_case(only: str, facts: dict[str, Any]) -> Iterator[Row]:
    rate = copy_rate()
    facts["copy"] = f"{rate / 1e3:.0f} GB/s"
    for case in all_cases():
        if only not in f"{case.op} {case.name}":
            continue
        ours, plain = time_case(case)
        notes = {"limit": case.bar_us, "share": f"{case.bytes / ours / rate:.0%}"}
        notes["verdict"] = "" if ours <= case.bar_us else "over"
        values = {"ours": ours} if plain is None else {"ours": ours, "torch": plain}
        yield Row({"op": case.op, "case": case.name}, values, notes=notes)
        torch.cuda.empty_cache()
    facts["copy again"] = f"{copy_rate() / 1e3:.0f} GB/s"


def latency() -> Iterator[Row]:
    """One token between two small kernels: the graph with the op less the graph without it."""
    other = torch.zeros(4096, device="cuda")
    bf16: dict[str, Any] = {"device": "cuda", "dtype": BF16}
    x, r, w, o = (torch.randn(1, 8192, **bf16) for _ in range(4))
    one, slot = torch.ones(1, device="cuda"), torch.zeros(1, device="cuda", dtype=torch.int64)
    k = torch.randn(1, 8, 128, **bf16)
    cache = torch.zeros(16, 16, 8, 128, **bf16)
    mla = torch.zeros(16, 16, 576, **bf16)
    c, pe = torch.randn(1, 512, **bf16), torch.randn(1, 64, **bf16)
    q, kr, cs = (torch.randn(1, n, **bf16) for n in (8192, 1024, 128))
    act = torch.randn(1, 28672, **bf16)
    out = torch.empty(1, 14336, **bf16)
    runs: dict[str, tuple[Callable[[], None], float]] = {
        "reshape_and_cache_flash": (
            lambda: kvcache_ops.reshape_and_cache_flash(k, k, cache, cache, slot, "auto", one, one),
            1.3,
        ),
        "concat_and_cache_mla": (
            lambda: kvcache_ops.concat_and_cache_mla(c, pe, mla, slot, "auto", one),
            1.4,
        ),
        "rms_norm": (lambda: kvcache_ops.rms_norm(o, x, w[0], 1e-5), 1.9),
        "fused_add_rms_norm": (lambda: kvcache_ops.fused_add_rms_norm(x, r, w[0], 1e-5), 2.0),
        "rotary_embedding": (
            lambda: kvcache_ops.rotary_embedding(slot, q, kr, 128, cs, True),
            1.5,
        ),
        "silu_and_mul": (lambda: kvcache_ops.silu_and_mul(out, act), 1.2),
    }
    calls = 50

    def without() -> None:
        for _ in range(calls):
            other.add_(1.0)

    base = median_us(graph_of(without).replay, 31)
    for name, (run, bar) in runs.items():

        def both(run: Callable[[], None] = run) -> None:
            for _ in range(calls):
                other.add_(1.0)
                run()

        added = (median_us(graph_of(both).replay, 31) - base) / calls
        notes = {"limit": bar, "verdict": "" if added <= bar else "over"}
        yield Row({"op": name, "case": "one token"}, {"ours": added}, notes=notes)


def swap() -> Iterator[Row]:
    for count, size, bar in ((1000, 256 << 10, 50.0), (10000, 16 << 10, 48.0)):
        gpu = torch.randint(0, 255, (count, size), device="cuda", dtype=torch.uint8)
        host = torch.zeros(count, size, dtype=torch.uint8).pin_memory()
        pairs = torch.stack([torch.randperm(count), torch.randperm(count)], 1)
        kvcache_ops.swap_blocks(gpu, host, size, pairs)
        torch.cuda.synchronize()
        if not torch.equal(host[pairs[:, 1]], gpu.cpu()[pairs[:, 0]]):
            raise AssertionError("swap_blocks: blocks differ")
        for name, src, dst in (("GPU to host", gpu, host), ("host to GPU", host, gpu)):
            us = median_us(partial(kvcache_ops.swap_blocks, src, dst, size, pairs), 7)
            rate = count * size / us / 1e3
            notes = {"limit": bar, "verdict": "" if rate >= bar else "under"}
            key = {"op": "swap_blocks", "case": f"{name}, {count} x {size >> 10} KB"}
            yield Row(key, {"ours": rate}, "GB/s", True, notes)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--only", default="", help="cases whose name contains this")
    add("--latency", action="store_true", help="one token between two kernels")
    add("--swap", action="store_true", help="swap_blocks over the host link")


def rows(options: argparse.Namespace, facts: dict[str, Any]) -> Iterator[Row]:
    if not torch.cuda.is_available():
        raise TopologyError("the ops are timed on one GPU, and torch sees none here")
    torch.manual_seed(0)
    if options.latency:
        yield from latency()
    elif options.swap:
        yield from swap()
    else:
        yield from each_case(options.only, facts)


def summary(record: Record) -> str:
    beyond = sum(bool(row.notes["verdict"]) for row in record.rows)
    return f"{beyond} of {len(record.rows)} miss the limit"
