"""Every op against its plain-torch reference on every case of the generator."""

from __future__ import annotations

import pytest
import torch
from ops_cases import Case, all_cases, storage
from ops_checks import check

import kvcache_ops

CASES = all_cases()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_reference(case: Case) -> None:
    check(case)


def sample(per_op: int) -> list[Case]:
    """A few cases of every op, spread over its list."""
    by_op: dict[str, list[Case]] = {}
    for case in CASES:
        by_op.setdefault(case.op, []).append(case)
    return [c for cases in by_op.values() for c in cases[:: max(1, len(cases) // per_op)]]


@pytest.mark.parametrize("case", sample(8), ids=str)
def test_same_bits_for_any_number_of_threads(case: Case) -> None:
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            args = case.args()
            getattr(kvcache_ops, case.op)(**args)
            results.append({k: v for k, v in args.items() if isinstance(v, torch.Tensor)})
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, value in results[0].items():
            a, b = storage(value).view(torch.uint8), storage(other[name]).view(torch.uint8)
            assert torch.equal(a, b), f"{case}: {name} depends on the number of threads"
