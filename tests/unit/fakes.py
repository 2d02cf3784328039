"""Compiles the fake vendor libraries of fake_libraries/ for tests that have no GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

_SOURCES = Path(__file__).with_name("fake_libraries")


def compile_fake(name: str, output: Path, *flags: str) -> str:
    """Compiles fake_libraries/<name>.c into the shared library `output`; skips without gcc."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("the fake libraries need a C compiler")
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", *flags]
    subprocess.run(
        [*command, "-o", str(output), str(_SOURCES / f"{name}.c"), "-lpthread"],
        check=True,
        timeout=120,
    )
    return str(output)
