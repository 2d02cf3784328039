"""The argument checks on a GPU: every tensor wrong once, the device included."""

from __future__ import annotations

import pytest
from ops_cases import all_cases
from ops_maker import Case
from test_bad_input import ACCEPTED, MUTATIONS, assert_refused, base_cases, wrong_arguments
from torch import Tensor

# Host memory on purpose: the mapping of swap_blocks, its two sides, and the pinned part of a cache.
HOST = {("swap_blocks", "*"), ("cp_gather_and_upconvert_fp8_kv_cache", "host_cache")}


@pytest.mark.parametrize(("case", "name", "mutation"), wrong_arguments(), ids=str)
def test_wrong_tensor(case: Case, name: str, mutation: str) -> None:
    args = case.args("cuda")
    args[name] = MUTATIONS[mutation](args[name])
    assert_refused(case, args, name)


def on_the_host() -> list[tuple[Case, str]]:
    return [
        (case, name)
        for case in base_cases()
        for name, value in case.args().items()
        if isinstance(value, Tensor) and not {(case.op, "*"), (case.op, name)} & HOST
    ]


@pytest.mark.parametrize(("case", "name"), on_the_host(), ids=str)
def test_wrong_device(case: Case, name: str) -> None:
    args = case.args("cuda")
    args[name] = args[name].cpu()
    assert_refused(case, args, name)


def test_every_op_is_here() -> None:
    assert {case.op for case in base_cases()} == {case.op for case in all_cases()}
    assert ACCEPTED
