"""Every op against its plain-torch reference on every case of the generator."""

from __future__ import annotations

import pytest
import torch
from ops_cases import all_cases, sample
from ops_checks import check
from ops_maker import Case, storage

import kvcache_ops


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_against_reference(case: Case) -> None:
    check(case)


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
