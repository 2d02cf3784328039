"""`communicators tune` as a user runs it, on CPU ranks: it ends well and its table decides."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from communicators import Group
from communicators.backends.torch_distributed import TorchDistributedCommunicator
from communicators.base import MODES, OPS, Capability, Request
from communicators.selection import tables, tuning
from communicators.selection.dispatcher import Dispatcher, table_directories
from communicators.selection.opening import candidates
from communicators.selection.policy import choose, preferred
from tests.threads import run_ranks


def test_the_table_of_two_cpu_ranks(tmp_path: Path) -> None:
    output = tmp_path / "cpu-2.json"
    arguments = [
        "tune", "--ranks", "2", "--output", str(output),
        "--ops", "all_reduce", "all_gather", "--max-bytes", "2048", "--commit", "abc",
        "--dtypes", "bfloat16", "float32",
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
    found = [(row.op, row.dtype, row.up_to_bytes) for row in table.rows]
    assert found == [
        ("all_reduce", "bfloat16", 1024), ("all_reduce", "bfloat16", 2048),
        ("all_reduce", "float32", 1024), ("all_reduce", "float32", 2048),
        ("all_gather", "bfloat16", 1024), ("all_gather", "bfloat16", 2048),
    ], "a row for each size; what moves bytes is measured once"  # fmt: skip
    for row in table.rows:
        assert row.communicator == preferred(row.us, ["cpu_shm", "torch_distributed"])
        request = Request(row.op, getattr(torch, row.dtype), row.up_to_bytes)
        times = table.times(request)
        assert times == tables.Times(row.us, f"at {row.up_to_bytes >> 10} KB")


def test_the_tables_that_ship_are_read() -> None:
    (folder,) = table_directories("")
    shipped = sorted(folder.glob("*.json"))
    assert shipped
    names = {kind.name for kind in candidates("cuda")}  # type: ignore[attr-defined]
    for path in shipped:
        table = tables.parse(path.read_text(), str(path))
        assert {row.communicator for row in table.rows} <= names | {"torch_distributed"}


def _chosen(world_size: int, op: str, dtype: torch.dtype, nbytes: int, mode: str) -> str | None:
    table = tables.load("NVIDIA H200", "NV18", world_size)
    every = Capability(frozenset(OPS), modes=frozenset(MODES))
    live = [(name, every) for name in ("custom_all_reduce", "pynccl", "torch_distributed")]
    return choose(Request(op, dtype, nbytes, mode), live, table).communicator


@pytest.mark.parametrize("mode", MODES)
def test_what_the_shipped_tables_choose(mode: str) -> None:
    """By the times that they hold: pynccl is before torch_distributed wherever 3% part them."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for op in tuning.TUNED_OPS:
        for nbytes in (8192, 1 << 20, 256 << 20):
            for dtype in (bf16, fp16):
                assert _chosen(2, op, dtype, nbytes, mode) == "custom_all_reduce"
        for dtype in (bf16, fp16):
            assert _chosen(4, op, dtype, 256 << 20, mode) == "pynccl"
            assert _chosen(4, op, dtype, 1 << 20, mode) == "custom_all_reduce"
    for nbytes in (16 << 20, 100 << 20, 256 << 20, 512 << 20):
        for dtype in (fp16, fp32, torch.uint8, torch.int64):
            assert _chosen(4, "all_gather", dtype, nbytes, mode) == "pynccl"


def test_a_cell_is_written_with_the_times_of_all_who_ran() -> None:
    def cell(nbytes: int, us: dict[str, float]) -> tuning.Cell:
        return tuning.Cell(Request("all_reduce", torch.bfloat16, nbytes), us, {})

    cells = [cell(1024, {"a": 2.0, "b": 1.96}), cell(2048, {"a": 2.1, "b": 2.0}), cell(4096, {})]
    written = tuning.rows(cells)
    assert [(row.up_to_bytes, row.communicator) for row in written] == [(1024, "a"), (2048, "b")]
    assert [row.us for row in written] == [cell.us for cell in cells[:2]]


def test_a_wrong_result_of_one_rank_is_timed_by_none() -> None:
    class Wrong(TorchDistributedCommunicator):
        def capability(self) -> Capability:
            return Capability(frozenset({"all_reduce"}))

        def run(self, op: str, out: Any, inp: Any, root: int = 0, *_: Any) -> None:
            out.copy_(inp.float() * 2 if self.group.rank == 0 else inp)

    def body(group: Group) -> list[tuning.Cell]:
        opened = [Wrong(group, torch.device("cpu"), None)]
        dispatcher = Dispatcher(group, torch.device("cpu"), opened)
        return list(
            tuning.measure(dispatcher, ["all_reduce"], [torch.float32], [1024, 2048], ["eager"])
        )

    for cells in run_ranks(2, body):
        assert [cell.us for cell in cells] == [{}, {}]
        assert all("rank 0: its result is" in cell.failed["torch_distributed"] for cell in cells)
