"""The argument checks on a GPU: every tensor wrong once, the device included."""

from __future__ import annotations

import pytest
from torch import Tensor

import kvcache_ops
from tests.unit.ops.ops_maker import Case
from tests.unit.ops.test_bad_input import (
    ACCEPTED,
    MUTATIONS,
    assert_refused,
    base_cases,
    wrong_arguments,
)

# Host memory on purpose: the mapping of swap_blocks, its two sides, the pinned part of a cache, and
# all of a batch.
HOST = {
    ("swap_blocks", "*"),
    ("swap_blocks_batch", "*"),
    ("cp_gather_and_upconvert_fp8_kv_cache", "host_cache"),
}


def device_of(case: Case) -> str:
    return "cpu" if case.op == "swap_blocks_batch" else "cuda"


@pytest.mark.parametrize(("case", "name", "mutation"), wrong_arguments(), ids=str)
def test_wrong_tensor(case: Case, name: str, mutation: str) -> None:
    args = case.args(device_of(case))
    args[name] = MUTATIONS[mutation](args[name])
    assert_refused(case, args, name)


@pytest.mark.parametrize("name", ["src_ptrs", "dst_ptrs", "sizes"])
def test_a_batch_whose_numbers_are_on_a_gpu(name: str) -> None:
    case = next(c for c in base_cases() if c.op == "swap_blocks_batch")
    args = case.args()
    args[name] = args[name].cuda()
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
    assert {case.op for case in base_cases()} == set(kvcache_ops.__all__)
    assert ACCEPTED
