"""Cases of arguments laid out otherwise: caches converted as memory, tables of padded batches,
index tensors and scales of other ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tests.unit.ops.cases_attention import attention_cases
from tests.unit.ops.cases_cache import cache_cases, text
from tests.unit.ops.cases_gather import gather_cases
from tests.unit.ops.ops_maker import BF16, F16, F32, U8, Args, Case, Maker


def permuted(m: Maker, order: tuple[int, ...], *shape: int, dtype: torch.dtype) -> Tensor:
    """Dense memory, after 3 items that are not its, seen with its dimensions in another order."""
    count = torch.Size(shape).numel()
    flat = m.poison(count + 3, dtype=dtype)[3:]
    return flat.view([shape[d] for d in order]).permute([order.index(d) for d in range(len(order))])


def _convert() -> Iterator[Case]:
    packed = ((5, 3, 4, 7, 8), (5, 3, 2, 7, 16))  # [NB, H, D/8, BS, 8] and [NB, H, D/16, BS, 16]
    straight = (0, 1, 2, 3, 4)
    layouts = {
        "packed": (*packed, straight, straight),
        "packed-permuted": (*packed, (1, 0, 3, 2, 4), (1, 0, 3, 2, 4)),
        "packed-two-orders": (*packed, straight, (4, 3, 2, 1, 0)),
        "HND": ((4, 16, 3, 46), (4, 16, 3, 46), (0, 2, 1, 3), (0, 2, 1, 3)),
        "reversed": ((4, 1, 3, 46), (4, 1, 3, 46), (3, 2, 1, 0), (3, 2, 1, 0)),
        "flattened": ((4, 16, 3, 46), (64 * 138,), (0, 2, 1, 3), (0,)),
        "one-element": ((1, 1, 1), (1,), (2, 0, 1), (0,)),
        "none": ((4, 0, 3), (0,), (2, 0, 1), (0,)),
    }
    for (name, layout), dtype in ((x, d) for x in layouts.items() for d in (F32, F16, BF16)):
        for to_codes in (True, False):

            def build(
                m: Maker,
                layout: tuple[tuple[int, ...], ...] = layout,
                dtype: torch.dtype = dtype,
                to_codes: bool = to_codes,
            ) -> Args:
                floats = permuted(m, layout[2], *layout[0], dtype=dtype)
                codes = permuted(m, layout[3], *layout[1], dtype=U8)
                output, given = (codes, floats) if to_codes else (floats, codes)
                return dict(output=output, input=given, scale=0.37, kv_dtype="fp8")

            case = text(name, dtype, "quantize" if to_codes else "restore")
            yield Case("convert_fp8", case, build, 41, 0.0 if to_codes else 0.001)


def taller(m: Maker, table: Tensor) -> Tensor:
    """Two more rows, of garbage."""
    count = 2 * table.shape[1:].numel()
    rows = m.ints([m.random.randrange(-(1 << 30), 1 << 30) for _ in range(count)], table.dtype)
    return torch.cat([table, rows.view(2, *table.shape[1:])])


def _padded_batches() -> Iterator[Case]:
    """Every op that takes a table, with more rows in it than there are sequences."""
    seen: dict[str, int] = {}
    for case in (*gather_cases(), *attention_cases()):
        args = case.args()
        maps = ["block_table", "block_tables", "seq_starts", "seq_lens", "workspace_starts"]
        names = [name for name in maps if name in args]
        if not names or seen.get(case.op, 0) == 3 or args.get("seq_starts", 0) is None:
            continue
        seen[case.op] = seen.get(case.op, 0) + 1

        def build(m: Maker, case: Case = case, names: list[str] = names) -> Args:
            args = case.build(m)
            return dict(args, **{n: taller(m, args[n]) for n in names})

        yield Case(case.op, f"{case.name}-padded-batch", build, case.seed, case.ulps, case.atol)


def _changed(
    cases: Iterator[Case], op: str, names: tuple[str, ...], how: Callable[[Tensor], Tensor]
) -> Iterator[Case]:
    """The first cases of an op, some arguments seen in another way."""
    found = (c for c in cases if c.op == op and isinstance(c.args().get(names[0]), Tensor))
    for case, _ in zip(found, range(4), strict=False):

        def build(m: Maker, case: Case = case) -> Args:
            args = case.build(m)
            return dict(args, **{n: how(args[n]) for n in names})

        yield Case(op, f"{case.name}-changed-{names[0]}", build, case.seed, case.ulps, case.atol)


def layout_cases() -> Iterator[Case]:
    yield from _convert()
    yield from _padded_batches()
    row = ("device_row_ids", "host_row_ids")
    upconvert = "cp_gather_and_upconvert_fp8_kv_cache"
    yield from _changed(gather_cases(), upconvert, row, lambda t: t.view(5, -1))
    scales = ("k_scale", "v_scale")
    yield from _changed(
        (c for c in cache_cases() if "-odd" in c.name and "fp8" in c.name),
        "reshape_and_cache_flash",
        scales,
        lambda t: t.view(1, -1, 1),
    )
