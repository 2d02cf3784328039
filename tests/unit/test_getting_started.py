"""The programs of docs/getting-started.md run, and print what the page says.

Both run in one pair of processes, without torchrun: what it would set is in their environment.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.unit.test_stateless import free_port

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = re.compile(r"```python\n# (\w+)\.py\n(.*?)```\n.*?```\n(.*?)```\n", re.DOTALL)
RUN_BOTH = """
import os, runpy
rank, address = int(os.environ["RANK"]), "file://" + os.path.abspath("meet")
runpy.run_path("job.py")
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
    del os.environ[name]
runpy.run_path("first.py")["work"](rank, address)
"""


def test_programs_print_what_the_page_says(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "getting-started.md").read_text()
    programs = {name: (code, output) for name, code, output in PROGRAM.findall(page)}
    assert set(programs) == {"first", "job"}
    for name, (code, _) in programs.items():
        (tmp_path / f"{name}.py").write_text(code)
    launcher = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RUN_BOTH],
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={
                **os.environ,
                **launcher,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "PYTHONPATH": str(ROOT),
                "CUDA_VISIBLE_DEVICES": "",
                "COMMUNICATORS_TIMEOUT_S": "60",
            },
        )
        for rank in (0, 1)
    ]
    try:
        printed = "".join(process.communicate(timeout=120)[0] for process in ranks)
    finally:
        for process in ranks:
            process.kill()
    said = "".join(output for _, output in programs.values())
    assert sorted(printed.splitlines()) == sorted(said.splitlines())
    assert [process.returncode for process in ranks] == [0, 0]
