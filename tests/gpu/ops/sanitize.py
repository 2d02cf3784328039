"""A few small cases of every op, for compute-sanitizer: see scripts/sanitize_gpu."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "unit" / "ops")]

from ops_cases import sample  # noqa: E402

import kvcache_ops  # noqa: E402


def main() -> None:
    count = 0
    for case in sample(4):
        args = case.args("cuda")
        getattr(kvcache_ops, case.op)(**args)
        count += 1
    torch.cuda.synchronize()
    print(f"{count} cases ran")


if __name__ == "__main__":
    main()
