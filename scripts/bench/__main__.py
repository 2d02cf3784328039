"""The driver of all benchmarks: python -m scripts.bench CASE [options]

A run prints its rows while it measures, then its table, and is kept as build/bench/COMMIT/CASE.json
(of several runs at one commit the last). `compare OLD NEW` does what --compare does after a run.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
from pathlib import Path

from communicators.cli.bench import driver, record
from communicators.errors import CommunicatorError

ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "all_reduce": "all-reduce on the GPUs here beside NCCL and torch's symmetric memory",
    "cpu": "CPU collectives in shared memory beside gloo and Open MPI",
    "decode": "a decode step of a tensor-parallel Llama, NCCL alone and our dispatch",
    "ops": "kvcache_ops on one GPU, against the rate of a copy",
    "ops_cpu": "kvcache_ops on the CPU beside torch and torch.compile",
    "queue": "MessageQueue beside multiprocessing.Queue and pyzmq",
    "quick_all_reduce": "the quantized all-reduce on GPUs beside the exact one",
    "quick_codecs": "the errors of the quantized all-reduce on activation-like data",
    "quick_model": "what quantized all-reduces do to a trained model",
}


def main(given: list[str]) -> int:
    listed = "\n".join(f"  {name:18}{text}" for name, text in CASES.items())
    if given[:1] and given[0] in CASES:
        return run(given[0], given[1:])
    if given[:1] == ["compare"]:
        return compare(given[1:])
    print(f"{(__doc__ or '').strip()}\n\n{listed}", file=sys.stdout if given else sys.stderr)
    return 0 if given[:1] in (["-h"], ["--help"]) else 2


def run(name: str, given: list[str]) -> int:
    case = importlib.import_module(f"scripts.bench.cases.{name}")
    parser = argparse.ArgumentParser(
        prog=f"scripts/bench/run {name}",
        description=case.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    case.add_arguments(parser)
    driver.add_arguments(parser)
    options = parser.parse_args(given)
    # Ranks and readers find this package wherever they are started.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    command = shlex.join(["scripts/bench/run", name, *given])
    return driver.drive(
        name, case.__doc__ or "", case.OURS, case.rows, options, command,
        summarize=getattr(case, "summary", lambda _: ""), keep=ROOT / "build" / "bench",
    )  # fmt: skip


def compare(given: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench/run compare")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.1, help="exit 1 above it (0.1)")
    options = parser.parse_args(given)
    try:
        return driver.compared(
            record.read(options.old), record.read(options.new), options.tolerance
        )
    except CommunicatorError as error:
        print(f"bench compare: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
