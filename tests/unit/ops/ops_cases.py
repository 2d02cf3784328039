"""All cases of the generator; see ops_maker for what a case is."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from tests.unit.ops.cases_addresses import address_cases
from tests.unit.ops.cases_attention import attention_cases
from tests.unit.ops.cases_cache import cache_cases
from tests.unit.ops.cases_elementwise import elementwise_cases
from tests.unit.ops.cases_gather import gather_cases
from tests.unit.ops.cases_layouts import layout_cases
from tests.unit.ops.ops_maker import Case


@functools.cache  # making them takes seconds, and arguments are made anew for each run
def all_cases() -> tuple[Case, ...]:
    """Those that run on every device."""
    ordinary = (elementwise_cases, cache_cases, gather_cases, attention_cases)
    return tuple(case for cases in (*ordinary, layout_cases) for case in cases())


@functools.cache
def cpu_cases() -> tuple[Case, ...]:
    """Those that run on the CPU alone too."""
    return (*all_cases(), *address_cases())


def sample(per_op: int, cases: Sequence[Case] | None = None) -> list[Case]:
    """A few cases of every op, spread over its list."""
    by_op: dict[str, list[Case]] = {}
    for case in all_cases() if cases is None else cases:
        by_op.setdefault(case.op, []).append(case)
    return [c for cases in by_op.values() for c in cases[:: max(1, len(cases) // per_op)]]
