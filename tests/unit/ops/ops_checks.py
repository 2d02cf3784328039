"""What a case must show: kernel and reference leave the same memory behind."""

from __future__ import annotations

import torch

import kvcache_ops
from kvcache_ops import reference
from tests.unit.ops.ops_maker import FLOATS, ONE_ULP, Case, behind, storage


def assert_same_memory(case: Case, name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    if behind(got):  # not the addresses, which differ, but what is there
        for i, (x, y) in enumerate(zip(behind(got), behind(expected), strict=True)):
            assert_same_memory(case, f"{name}[{i}]", x, y)
        return
    a, b = storage(got).cpu(), storage(expected).cpu()
    if torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
        return
    assert case.ulps, f"{case}: {name} differs in {differing(a, b)}"
    if a.dtype == torch.uint8:
        a, b = a.view(torch.float8_e4m3fn).float(), b.view(torch.float8_e4m3fn).float()
        tolerance = case.ulps * 2.0**-3  # an ulp of e4m3: a value beside a tie may go either way
        assert (a.nan_to_num() != b.nan_to_num()).float().mean() < 0.02, f"{case}: {name}"
    else:
        assert a.dtype in FLOATS, f"{case}: {name} differs in {differing(a, b)}"
        tolerance = case.ulps * ONE_ULP[a.dtype]
    torch.testing.assert_close(
        a,
        b,
        rtol=tolerance,
        atol=case.atol,
        equal_nan=True,
        msg=lambda text: f"{case}: {name}: {text}",
    )


def differing(a: torch.Tensor, b: torch.Tensor) -> str:
    item = a.element_size()
    different = (a.view(torch.uint8) != b.view(torch.uint8)).view(-1, item).any(1)
    at = int(different.nonzero()[0])
    return f"{int(different.sum())} elements, first {at}: {a[at]} instead of {b[at]}"


def check(case: Case, device: str = "cpu") -> None:
    """Run the public function and the reference on equal arguments and compare all memory."""
    got, expected = case.args(device), case.args(device)
    getattr(kvcache_ops, case.op)(**got)
    getattr(reference, case.op)(**expected)
    for name, value in got.items():
        if isinstance(value, torch.Tensor):
            assert_same_memory(case, name, value, expected[name])
