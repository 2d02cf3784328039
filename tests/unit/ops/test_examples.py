"""The example of every op's docstring runs and prints what it says."""

from __future__ import annotations

import doctest

import pytest
import torch

import kvcache_ops


@pytest.mark.parametrize("name", kvcache_ops.__all__)
def test_example(name: str) -> None:
    function = getattr(kvcache_ops, name)
    names = {"torch": torch, **{n: getattr(kvcache_ops, n) for n in kvcache_ops.__all__}}
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    examples = doctest.DocTestFinder(recurse=False).find(function, name, globs=names)
    assert examples and examples[0].examples, f"{name} has no example"
    for example in examples:
        runner.run(example)
    assert runner.summarize().failed == 0
