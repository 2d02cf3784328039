"""Times CPU collectives through their public Python calls: this library, gloo, Open MPI.

The systems run in the same processes and take turns within every cell, so that what else the
machine does falls on all of them. Every result is compared with its reference before it is timed.
A cell is the median over the rounds of the slowest rank's time a call.

`bytes` is what one rank contributes. busbw is nccl-tests' (doc/PERFORMANCE.md there): the bytes
that must cross between ranks, by the time: all_reduce bytes * 2(W-1)/W, the others bytes * (W-1).
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

OPS = ("all_reduce", "all_gather", "gather", "reduce_scatter")
OURS = "communicators"


def mpi_missing() -> str:
    """What Open MPI needs that is not here; empty if nothing."""
    if shutil.which("mpirun") is None:
        return "mpirun was not found (Debian: apt-get install openmpi-bin libopenmpi-dev)"
    if importlib.util.find_spec("mpi4py") is None:
        return "the Python package mpi4py was not found (pip install mpi4py)"
    return ""


def run_ranks(world_size: int, with_mpi: bool, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Starts the ranks, under mpirun where MPI is measured; returns the rows, printing each."""
    from torch._C._distributed_c10d import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    script = str(Path(__file__).with_name("bench_cpu_rank.py"))
    me = [sys.executable, script, "--ops", *options.ops, "--dtypes", *options.dtypes]
    me += ["--with-mpi"] if with_mpi else []
    me += ["--pin"] if options.pin else []
    me += ["--threads", str(options.threads), "--work-us", str(options.work_us)]
    me += ["--sizes", *map(str, options.sizes)] if options.sizes else []
    environment = dict(os.environ, MASTER_PORT=str(store.port), WORLD_SIZE=str(world_size))
    if with_mpi:
        shell = 'export RANK=$OMPI_COMM_WORLD_RANK; exec "$0" "$@"'
        command = ["mpirun", "-n", str(world_size), "--oversubscribe", "--bind-to", "none"]
        command += ["--allow-run-as-root"] if os.getuid() == 0 else []
        first = subprocess.Popen(
            [*command, "sh", "-c", shell, *me], env=environment, stdout=subprocess.PIPE, text=True
        )
        others = []
    else:
        first, *others = [
            subprocess.Popen(
                me,
                env=dict(environment, RANK=str(rank)),
                stdout=subprocess.PIPE if rank == 0 else None,
                text=True,
            )
            for rank in range(world_size)
        ]
    rows = []
    assert first.stdout is not None
    for line in first.stdout:
        if not line.startswith("{"):
            print(line, end="")
            continue
        rows.append(json.loads(line))
        print(table_line(rows[-1]), flush=True)
    if any(process.wait() for process in [first, *others]):
        raise SystemExit("a rank failed")
    return rows


def busbw(row: dict[str, Any], us: float) -> float:
    """GB/s."""
    w = row["ranks"]
    factor = 2 * (w - 1) / w if row["op"] == "all_reduce" else w - 1
    return row["bytes"] * factor / us / 1e3


def size_name(nbytes: int) -> str:
    for unit, shift in (("MB", 20), ("KB", 10)):
        if nbytes >= 1 << shift:
            return f"{nbytes >> shift} {unit}"
    return f"{nbytes} B"


HEADER = (
    "| op | dtype | ranks | bytes | communicators, us | busbw, GB/s | gloo, us | gloo / ours "
    "| Open MPI, us | Open MPI / ours |\n|---|---|---|---|---|---|---|---|---|---|"
)


def table_line(row: dict[str, Any]) -> str:
    ours = row["us"][OURS]

    def against(name: str) -> str:
        if name not in row["us"]:
            return "- | -"
        return f"{row['us'][name]:.1f} | {row['us'][name] / ours:.1f}"

    return (
        f"| {row['op']} | {row['dtype']} | {row['ranks']} | {size_name(row['bytes'])} | "
        f"{ours:.1f} | {busbw(row, ours):.2f} | {against('gloo')} | {against('Open MPI')} |"
    )


def machine() -> dict[str, Any]:
    import torch

    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "unknown",
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    mpi = ""
    if not mpi_missing():
        answer = subprocess.run(
            ["mpirun", "--version"], capture_output=True, text=True, check=False
        )
        mpi = answer.stdout.splitlines()[0]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu,
        "cpus": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "mpi": mpi or mpi_missing(),
        "commit": commit,
        "command": "scripts/bench_cpu " + " ".join(sys.argv[1:]),
    }


def markdown(facts: dict[str, Any], rows: list[dict[str, Any]], plot: str) -> str:
    busy = "; other work was running, compare within a row" if facts["load_average"] > 0.5 else ""
    lines = [
        "# CPU shared memory beside gloo and Open MPI",
        "",
        f"Written by `{facts['command'].strip()}` on {facts['date']}, commit {facts['commit']}: "
        f"{facts['cpus']} CPUs of {facts['cpu']}, torch {facts['torch']}, {facts['mpi']}. "
        f"Load average when it started: {facts['load_average']:.1f}{busy}.",
        "",
        (__doc__ or "").split("\n\n", 1)[1].strip(),
        "",
        HEADER,
        *(table_line(row) for row in rows),
    ]
    if plot:
        lines += ["", f"![all_reduce]({plot})"]
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = [row for row in rows if row["op"] == "all_reduce" and row["ranks"] == 2]
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for dtype in dict.fromkeys(row["dtype"] for row in cells):
        for system in (OURS, "gloo", "Open MPI"):
            points = [
                (row["bytes"], row["us"][system])
                for row in cells
                if row["dtype"] == dtype and system in row["us"]
            ]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=f"{system}, {dtype}")
    axes.set(
        xscale="log", yscale="log", xlabel="bytes", ylabel="us a call", title="all_reduce, 2 ranks"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], help="world sizes")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--sizes", type=int, nargs="+", help="bytes that one rank contributes")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of a rank")
    parser.add_argument("--pin", action="store_true", help="pin each rank to its share of the CPUs")
    parser.add_argument(
        "--work-us", type=float, default=0.0, help="other work of each rank before each call"
    )
    parser.add_argument("--json", help="write the rows and the machine's facts here")
    parser.add_argument("--markdown", help="write the table here")
    parser.add_argument("--plot", help="write a PNG here (needs matplotlib: the extra `plot`)")
    options = parser.parse_args()
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib")
    facts = machine()
    missing = mpi_missing()
    if missing:
        print(f"Open MPI is left out: {missing}")
    print(f"{facts['cpus']} CPUs of {facts['cpu']}, load average {facts['load_average']:.1f}")
    print(HEADER, flush=True)
    rows = []
    for world_size in options.ranks:
        # Its ranks never sleep: with more ranks than CPUs there is nothing to compare with.
        with_mpi = not missing and world_size <= facts["cpus"]
        rows += run_ranks(world_size, with_mpi, options)
    if options.plot:
        draw(rows, options.plot)
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
    if options.markdown:
        plot = Path(options.plot).name if options.plot else ""
        Path(options.markdown).write_text(markdown(facts, rows, plot))


if __name__ == "__main__":
    main()
