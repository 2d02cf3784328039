"""All cases of the generator; see ops_maker for what a case is."""

from __future__ import annotations

from cases_attention import attention_cases
from cases_cache import cache_cases
from cases_elementwise import elementwise_cases
from ops_maker import Case


def all_cases() -> list[Case]:
    return [*elementwise_cases(), *cache_cases(), *attention_cases()]


def sample(per_op: int) -> list[Case]:
    """A few cases of every op, spread over its list."""
    by_op: dict[str, list[Case]] = {}
    for case in all_cases():
        by_op.setdefault(case.op, []).append(case)
    return [c for cases in by_op.values() for c in cases[:: max(1, len(cases) // per_op)]]
