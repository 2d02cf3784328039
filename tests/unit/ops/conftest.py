"""Fixtures of the ops' tests."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

from communicators.bindings.native import load


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
