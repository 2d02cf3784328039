"""Every op against its plain-torch reference on every case of the generator."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from ops_cases import cpu_cases, sample
from ops_checks import check
from ops_maker import Case, behind, storage

import kvcache_ops
from communicators.native import load


@pytest.mark.parametrize("case", cpu_cases(), ids=str)
def test_against_reference(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", sample(8, cpu_cases()), ids=str)
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
            pairs = zip(behind(value) or [value], behind(other[name]) or [other[name]], strict=True)
            for a, b in pairs:
                same = torch.equal(storage(a).view(torch.uint8), storage(b).view(torch.uint8))
                assert same, f"{case}: {name} depends on the number of threads"


@pytest.fixture(params=[1, 2, 3], ids=["portable", "AVX2", "AVX-512"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[int]:
    """Kernels of one instruction set alone, where the processor has it."""
    limit = ctypes.CDLL(str(load("cpu"))).kvcache_limit_isa
    try:
        if limit(request.param) != request.param:
            pytest.skip("this processor does not have it")
        yield request.param
    finally:
        limit(3)


def test_every_instruction_set(instruction_set: int) -> None:
    for case in sample(24, cpu_cases()):
        check(case)
