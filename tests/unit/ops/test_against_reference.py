"""Every op against its plain-torch reference on every case of the generator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvcache_ops
from scripts.bench.ops.cpu import cases
from tests.unit.ops.ops_cases import cpu_cases, sample
from tests.unit.ops.ops_checks import check
from tests.unit.ops.ops_maker import BF16, Case, behind, storage


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


def larger_cases() -> list[Any]:
    """Every op on inputs that are worth several threads: those of the benchmark at 64 tokens."""
    torch.manual_seed(0)
    return list(cases(64, BF16))


def test_same_bits_for_any_number_of_threads_on_larger_inputs() -> None:
    threads, seen = torch.get_num_threads(), set()
    for case in larger_cases():
        tensors = {**case.tensors, **(case.other or {})}
        begin = {k: v.clone() for k, v in tensors.items() if isinstance(v, torch.Tensor)}
        results = []
        try:
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                for name, value in begin.items():
                    tensors[name].copy_(value)
                case.ours(**case.tensors)
                results.append([tensors[name].clone() for name in case.written])
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), case.op
        seen.add(case.op)
    assert seen == set(kvcache_ops.__all__)


def test_every_instruction_set(instruction_set: int) -> None:
    for case in sample(12, cpu_cases()):
        check(case)
