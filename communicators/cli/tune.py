"""`communicators tune`: measures all communicators on this machine and writes its table.

    communicators tune --ranks 2 --output h200-nv18-2.json

Put the file into `communicators/selection/data/` or a directory that COMMUNICATORS_TABLE_DIR names.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

_LARGEST = 256 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--ranks", type=int, default=0, help="default: the GPUs, or 2 on a CPU")
    parser.add_argument("--ops", nargs="+", default=None, help="default: those that are tuned")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], help="torch's names")
    parser.add_argument("--max-bytes", type=int, default=_LARGEST, help="largest size measured")
    parser.add_argument("--commit", default="", help="stated in the table; default: git's HEAD")


def run(args: argparse.Namespace) -> int:
    """Starts the ranks, or is one of them when torchrun has started it."""
    import torch

    if torch.distributed.is_torchelastic_launched():
        return _rank(args)
    ranks = args.ranks or (torch.cuda.device_count() if torch.cuda.is_available() else 2)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", str(ranks), "-m", "communicators.cli", *args.given,
    ]  # fmt: skip
    return subprocess.run(command, check=False).returncode


def _rank(args: argparse.Namespace) -> int:
    import torch

    from .. import parallel_state
    from ..selection import opening, tuning
    from .bench import record

    world = parallel_state.init_distributed_environment()
    dispatcher = world.dispatcher()
    modes = ("eager", "capture") if world.device.type == "cuda" else ("eager",)
    cells = []
    for cell in tuning.measure(
        dispatcher,
        args.ops or tuning.TUNED_OPS,
        [getattr(torch, name) for name in args.dtypes],
        list(_sizes(args.max_bytes)),
        modes,
    ):
        cells.append(cell)
        if world.is_first_rank:
            times = "  ".join(f"{name} {us:.1f} us" for name, us in sorted(cell.us.items()))
            failed = "  ".join(f"({name}: {why})" for name, why in cell.failed.items())
            print(f"{cell.request}: {times} {failed}", flush=True)
    device, link = opening.machine_shape(world.group, world.device)  # collective
    if world.is_first_rank:
        rows = [asdict(row) for row in tuning.rows(cells)]
        table = {
            "machine": {"device": device, "link": link, "world_size": world.world_size},
            "measured": {
                "date": datetime.date.today().isoformat(),
                "driver": opening.driver_version(world.device),
                "commit": args.commit or record.commit(),
                "command": "communicators " + " ".join(args.given),
            },
            "merged": False,  # each row is one size's, see tables.py
            "rows": rows,
        }
        args.output.write_text(json.dumps(table, indent=1) + "\n")
        print(f"{len(rows)} rows for {world.world_size} x {device} {link}: {args.output}")
    world.barrier()
    parallel_state.destroy_distributed_environment()
    return 0


def _sizes(largest: int) -> Iterator[int]:
    size = 1024
    while size <= largest:
        yield size
        size *= 2
