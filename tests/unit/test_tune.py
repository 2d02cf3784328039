"""`communicators tune` as a user runs it, on CPU ranks: it ends well and its table decides."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

from communicators import tables
from communicators.backends import candidates
from communicators.base import Request


def test_the_table_of_two_cpu_ranks(tmp_path: Path) -> None:
    output = tmp_path / "cpu-2.json"
    arguments = [
        "tune", "--ranks", "2", "--output", str(output),
        "--ops", "all_reduce", "all_gather", "--max-bytes", "2048", "--commit", "abc",
    ]  # fmt: skip
    # By a caller in Python, whose own command line says nothing of it.
    code = f"from communicators.cli import main; raise SystemExit(main({arguments}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "all_reduce of 1024 bytes of bfloat16, eager: cpu_shm" in done.stdout
    assert "all_gather of 2048 bytes" in done.stdout
    written = json.loads(output.read_text())
    assert written["measured"]["commit"] == "abc"
    assert written["measured"]["command"] == "communicators " + " ".join(arguments)
    table = tables.load(f"CPU {platform.machine()}", "", 2, [tmp_path])
    assert table is not None
    row = table.find(Request("all_reduce", torch.bfloat16, 1024, "eager"))
    assert row is not None and row.communicator in row.us


def test_the_tables_that_ship_are_read() -> None:
    shipped = sorted((Path(tables.__file__).parent / "tables").glob("*.json"))
    assert shipped
    names = {kind.name for kind in candidates("cuda")}  # type: ignore[attr-defined]
    for path in shipped:
        table = tables.parse(path.read_text(), str(path))
        assert {row.communicator for row in table.rows} <= names | {"torch_distributed"}
    table = tables.load("NVIDIA H200", "NV18", 2)
    row = table.find(Request("all_reduce", torch.bfloat16, 8192, "capture"))
    assert row is not None and row.communicator == "custom_all_reduce"
