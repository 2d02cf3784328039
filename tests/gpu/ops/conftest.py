"""The case generator lives with the CPU tests; here it builds on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvcache_ops import _native


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = str(Path(__file__).parent)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session", autouse=True)
def gpu_library() -> None:
    """Loaded before the first test, whichever that is: a call whose first tensor is on the host by
    mistake loads the CPU's alone, and torch itself then says that there is nothing for CUDA."""
    if torch.cuda.is_available():
        _native._load("cuda")
