"""torch's own tests of a backend, over ours: the class of torch.testing that torch runs for gloo.

    python -m pytest tests/c10d/torch_suite.py -k "not ddp"        two ranks, on the CPU
    SUITE_BACKEND=gloo python -m pytest tests/c10d/torch_suite.py  the same tests over gloo

Many of these tests ask for the backend's name and know gloo, NCCL and MPI. So the module is read as
for gloo, and then told ours: what gloo is tested for, ours is.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ["BACKEND"] = "gloo"
os.environ.setdefault("WORLD_SIZE", "2")
os.environ.setdefault("INIT_METHOD", "env://")
os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
os.environ.setdefault("MASTER_PORT", "0")
if "TEMP_DIR" not in os.environ:  # also read by the ranks, which inherit it
    os.environ["TEMP_DIR"] = tempfile.mkdtemp()
    for name in ("barrier", "test_dir", "init_dir"):
        Path(os.environ["TEMP_DIR"], name).mkdir()

from torch.testing._internal.distributed import distributed_test  # noqa: E402

import communicators.c10d  # noqa: E402

distributed_test.BACKEND = os.environ.get("SUITE_BACKEND", communicators.c10d.BACKEND)


class TestBackend(distributed_test.TestDistBackend, distributed_test.DistributedTest._DistTestBase):
    def setUp(self) -> None:
        super().setUp()
        self._spawn_processes()
