"""Start the ranks of the job on this machine, as torchrun does."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

MODULE = "scripts.tp_llama"
ROOT = Path(__file__).parents[2]


def cores() -> int:
    return len(os.sched_getaffinity(0))


@contextmanager
def environment(ranks: int) -> Iterator[None]:
    """What the ranks inherit: where this package lies, and a fair share of the cores."""
    before = dict(os.environ)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // ranks)))
    # OpenMP threads that spin between two ops take the core from the other ranks.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [before.get("PYTHONPATH")])]
    )
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def launch(ranks: int, arguments: list[str], module: str = MODULE) -> int:
    """Run ``module`` on ``ranks`` ranks and wait; the exit code of the first that failed, or 0.

    The ranks say what went wrong themselves, so the launcher's own report is left out.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id="tp_llama",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",  # the host's own name need not resolve
        max_restarts=0,
        monitor_interval=0.1,
    )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        with environment(ranks):
            elastic_launch(config, sys.executable)("-u", "-m", module, *arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode < 0:
            sys.stderr.write(f"rank {failure.local_rank} was ended by signal {-failure.exitcode}\n")
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as stopped:  # by the user; the ranks have been ended
        return 128 + stopped.sigval
    return 0
