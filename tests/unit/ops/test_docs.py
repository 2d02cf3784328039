"""docs/ops.md and docs/api.md say what the docstrings say."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import kvcache_ops

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("page", ["ops", "api"])
def test_page_is_current(page: str) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / f"docs_{page}"))
    written = (ROOT / "docs" / f"{page}.md").read_text()
    assert script["document"]() == written, f"run scripts/docs_{page}"


def test_importing_loads_no_library() -> None:
    code = (
        "import sys, torch, kvcache_ops\n"
        "assert 'communicators' not in sys.modules\n"
        "assert '_native_cpu' not in open('/proc/self/maps').read()\n"
        "assert hasattr(torch.ops.kvcache_ops, 'rms_norm')\n"
        "assert '_native_cpu' in open('/proc/self/maps').read()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", kvcache_ops.__all__)
def test_page_says_everything_of_every_op(name: str) -> None:
    text = (ROOT / "docs" / "ops.md").read_text()
    section = text.split(f"\n### {name}\n")[1].split("\n##")[0]
    assert f"kvcache_ops::{name}(" in section  # the schema
    for part in ("**Args**", "Layout", "**Raises**", "\nSource: ", "```python\n>>> "):
        assert part in section, part
    assert section.count("```") == 6, "schema, layout and example are closed"
