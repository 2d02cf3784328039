from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import Any

from communicators.cli.bench import cpu, driver
from communicators.cli.bench.record import Row

from ..peers import open_mpi

__doc__ = cpu.__doc__
OURS = (cpu.OURS,)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    driver.add_ranks(parser, [2])
    driver.add_collectives(parser, ["float32", "bfloat16"])
    add = parser.add_argument
    add("--ops", nargs="+", choices=cpu.OPS, default=list(cpu.OPS))
    add("--threads", type=int, default=1, help="torch threads of a rank")
    add("--pin", action="store_true", help="pin each rank to its share of the CPUs")
    add("--work-us", type=float, default=0.0, help="other work of each rank before each call")


def rows(options: argparse.Namespace, facts: dict[str, Any]) -> Iterator[Row]:
    missing = open_mpi.missing()
    facts["Open MPI"] = missing or open_mpi.version()
    if missing:
        print(f"Open MPI is left out: {missing}")
    for world_size in options.ranks:
        # Its ranks never sleep: with more ranks than CPUs there is nothing to compare with.
        with_mpi = not missing and world_size <= len(os.sched_getaffinity(0))
        options.peer = open_mpi.__name__ if with_mpi else None
        yield from cpu.rows(options, world_size, open_mpi.prefix(world_size) if with_mpi else ())
