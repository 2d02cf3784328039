"""What each op leaves in memory on a slice of the generated cases, a digest a line.

scripts/test_builds compares the lines of two builds.

COMMUNICATORS_NATIVE_DIR names the build.
"""

from __future__ import annotations

import ctypes
import hashlib

import torch

import kvcache_ops
from communicators.bindings import native
from tests.unit.ops.ops_cases import cpu_cases, sample
from tests.unit.ops.ops_maker import behind, storage


def main() -> None:
    limit = ctypes.CDLL(str(native.load("cpu"))).kvcache_limit_isa
    for level in (1, 2, 3):
        if limit(level) != level:
            continue
        for case in sample(8, cpu_cases()):
            args, digest = case.args(), hashlib.sha256()
            getattr(kvcache_ops, case.op)(**args)
            for value in args.values():
                if not isinstance(value, torch.Tensor):
                    continue
                for written in behind(value) or [value]:  # not addresses, but what is there
                    digest.update(storage(written).view(torch.uint8).numpy())
            print(level, case, digest.hexdigest()[:16])


if __name__ == "__main__":
    main()
