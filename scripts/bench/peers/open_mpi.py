"""Open MPI through mpi4py, in ranks that mpirun starts."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import torch


def missing() -> str:
    """What it needs that is not here; empty if nothing."""
    if shutil.which("mpirun") is None:
        return "mpirun was not found (Debian: apt-get install openmpi-bin libopenmpi-dev)"
    if importlib.util.find_spec("mpi4py") is None:
        return "the Python package mpi4py was not found (pip install mpi4py)"
    return ""


def version() -> str:
    answer = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=False)
    return answer.stdout.splitlines()[0]


def prefix(world_size: int) -> list[str]:
    root = ["--allow-run-as-root"] if os.getuid() == 0 else []
    return ["mpirun", "-n", str(world_size), "--oversubscribe", "--bind-to", "none", *root]


def calls(op: str, x: Any, out: Any) -> dict[str, Callable[[], Any]]:
    from mpi4py import MPI

    if x.dtype != torch.float32:  # MPI has no bfloat16
        return {}
    comm, a, b = MPI.COMM_WORLD, x.numpy(), out.numpy()
    if op == "all_reduce":
        return {"Open MPI": lambda: comm.Allreduce(MPI.IN_PLACE, a)}
    if op == "all_gather":
        return {"Open MPI": lambda: comm.Allgather(a, b)}
    if op == "gather":
        target = b if comm.Get_rank() == 0 else None
        return {"Open MPI": lambda: comm.Gather(a, target, 0)}
    if op == "all_to_all":
        return {"Open MPI": lambda: comm.Alltoall(a, b)}
    return {"Open MPI": lambda: comm.Reduce_scatter_block(a, b)}
