"""`communicators bench`: the collectives on this machine, beside NCCL, gloo and torch's own.

    communicators bench                           all GPUs; without two of them, two CPU ranks
    communicators bench --sizes 64K 4M --plot all_reduce.png

Results are checked before they are timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from ...errors import InvalidArgumentError
from . import cpu, gpu
from .driver import add_arguments as add_output_arguments
from .driver import add_collectives, add_ranks, drive
from .record import Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--ops", nargs="+", choices=cpu.OPS, default=["all_reduce"])
    parser.add_argument("--only", default="", help="GPU implementations whose name contains this")
    add_ranks(parser, (), "world sizes; 2 on CPUs unless given")
    add_collectives(parser)
    add_output_arguments(parser)
    parser.set_defaults(timeout=300.0, pin=False, threads=1, work_us=0.0, peer=None)


def run(args: argparse.Namespace) -> int:
    """0, or 1 when something was refused or wrong, or ours is worse than what --compare names."""
    count = gpu.gpus() if args.device != "cpu" else 0
    on_gpus = args.device == "cuda" or count > 1
    case = gpu if on_gpus else cpu
    args.ranks = args.ranks or [count if on_gpus else 2]
    args.dtypes = args.dtypes or ["bfloat16" if on_gpus else "float32"]

    def rows(options: argparse.Namespace, facts: dict[str, Any]) -> Iterator[Row]:
        if on_gpus and options.ops != ["all_reduce"]:
            raise InvalidArgumentError(
                f"--ops {' '.join(options.ops)}: on GPUs all_reduce alone is measured; "
                "`communicators tune` times the others"
            )
        for world_size in options.ranks:
            yield from case.rows(options, world_size)

    ours = gpu.OURS if on_gpus else (cpu.OURS,)
    command = " ".join(["communicators", *args.given])
    return drive("all_reduce" if on_gpus else "cpu", case.__doc__ or "", ours, rows, args, command)
