from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from communicators.cli.bench import driver, gpu
from communicators.cli.bench.record import Row

__doc__ = gpu.__doc__
OURS = gpu.OURS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    driver.add_ranks(parser, [])
    driver.add_collectives(parser, ["bfloat16"])
    parser.add_argument("--only", default="", help="implementations whose name contains this")


def rows(options: argparse.Namespace, facts: dict[str, Any]) -> Iterator[Row]:
    for world_size in options.ranks or [gpu.gpus()]:
        yield from gpu.rows(options, world_size)
