"""torch's own tests of a backend, over ours: the class of torch.testing that torch runs for gloo.

    python -m pytest tests/c10d/torch_suite.py -k "not ddp"        two ranks, on the CPU
    SUITE_BACKEND=gloo python -m pytest tests/c10d/torch_suite.py  the same tests over gloo

Many of these tests ask for the backend's name, in decorators and inside, and know gloo, NCCL and
MPI. So here the name gloo stands for our backend: groups that ask for gloo are made of ours, and
get_backend() says gloo of them.
"""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ["BACKEND"] = "gloo"
os.environ.setdefault("WORLD_SIZE", "2")
os.environ.setdefault("INIT_METHOD", "env://")
os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
os.environ.setdefault("MASTER_PORT", "0")
if "TEMP_DIR" not in os.environ:  # also read by the ranks, which inherit it
    os.environ["TEMP_DIR"] = tempfile.mkdtemp()
    for name in ("barrier", "test_dir", "init_dir"):
        Path(os.environ["TEMP_DIR"], name).mkdir()

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed import distributed_test

import communicators.c10d

OURS = communicators.c10d.BACKEND


def _ours_for_gloo(make: Any) -> Any:
    @functools.wraps(make)
    def made(*arguments: Any, **named: Any) -> Any:
        arguments = tuple(OURS if isinstance(x, str) and x == "gloo" else x for x in arguments)
        if named.get("backend", "gloo") in (None, "gloo"):
            named["backend"] = OURS
        return make(*arguments, **named)

    return made


def _gloo_for_ours(get: Any) -> Any:
    @functools.wraps(get)
    def got(*arguments: Any, **named: Any) -> Any:
        return "gloo" if (name := get(*arguments, **named)) == OURS else name

    return got


if os.environ.get("SUITE_BACKEND", OURS) == OURS:
    distributed_test.PROFILING_SUPPORTED_BACKENDS = []  # our calls are no events of the profiler
    dist.init_process_group = _ours_for_gloo(dist.init_process_group)
    dist.new_group = _ours_for_gloo(dist.new_group)
    dist.get_backend = distributed_c10d.get_backend = _gloo_for_ours(distributed_c10d.get_backend)


class TestBackend(distributed_test.TestDistBackend, distributed_test.DistributedTest._DistTestBase):
    def setUp(self) -> None:
        super().setUp()
        self._spawn_processes()
