"""Run by test_sanitizers.py in a process with AddressSanitizer's runtime: the ops of a library.

    python -m tests.unit.ops.sanitized_run cases | refused | planted-address | planted-undefined

COMMUNICATORS_NATIVE_DIR holds the library.
"""

from __future__ import annotations

import ctypes
import sys

import torch

import kvcache_ops
from communicators.bindings import native
from tests.unit.ops.ops_cases import cpu_cases, sample
from tests.unit.ops.ops_checks import check
from tests.unit.ops.ops_maker import Maker


def cases() -> None:
    """A slice of the cases of every op, on every instruction set, against the reference."""
    limit, done, ops = ctypes.CDLL(str(native.load("cpu"))).kvcache_limit_isa, 0, set()
    for level, of_each in ((1, 4), (2, 4), (3, 10)):
        if limit(level) != level:
            continue
        for case in sample(of_each, cpu_cases()):
            check(case)
            done, ops = done + 1, ops | {case.op}
    print(f"{done} cases of {len(ops)} ops")


def refused() -> None:
    """Each argument wrong once: what is refused must not be looked at too closely either."""
    from tests.unit.ops.test_bad_input import MUTATIONS, assert_refused, wrong_arguments

    found = wrong_arguments()
    for case, name, mutation in found:
        args = case.args()
        args[name] = MUTATIONS[mutation](args[name])
        assert_refused(case, args, name)
    print(f"{len(found)} refusals")


def grouped(slot: int, block_stride: int) -> None:
    """An op that takes addresses: nobody can check that a slot lies in its cache."""
    m = Maker(1, torch.device("cpu"))
    cache = torch.zeros(4 * 8, dtype=torch.uint8)
    kvcache_ops.concat_and_cache_mla_grouped(
        m.normal(1, 1, 6, dtype=torch.bfloat16),
        m.normal(1, 1, 2, dtype=torch.bfloat16),
        torch.tensor([cache.data_ptr()]),
        torch.tensor([[slot]]),
        4,
        block_stride,
        8,
        None,
        "fp8",
    )
    print("nothing was reported")


def main() -> None:
    what = sys.argv[1]
    if what == "planted-address":
        grouped(slot=4, block_stride=32)  # one past the cache
    elif what == "planted-undefined":
        grouped(slot=16, block_stride=1 << 62)  # 4 * 2^62 is no int64
    else:
        {"cases": cases, "refused": refused}[what]()


if __name__ == "__main__":
    main()
