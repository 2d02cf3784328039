"""`communicators p2p-check`: which GPU reaches which GPU's memory, and how fast.

One matrix each of what the driver claims and a real copy proves, of NVLinks, of latency and of
bandwidth. Results are remembered until the next boot or driver; `--refresh` makes them anew. It
answers within its deadline, also when a driver call hangs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch is imported when the command runs, not when its options are listed
    from ..peer_access.topology import GpuFacts, Unknown
    from ..settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the matrix as JSON")
    parser.add_argument(
        "--refresh", action="store_true", help="forget what is known of these GPUs and try again"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the matrix as a heat map (matplotlib)")
    parser.add_argument(
        "--no-measure", action="store_true", help="prove access only, without bandwidth and latency"
    )
    parser.add_argument(
        "--deadline", type=float, default=300.0, help="seconds that all pairs together may take"
    )


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand to an argparse subparsers object."""
    add_arguments(subparsers.add_parser("p2p-check", description=__doc__))


def run(args: argparse.Namespace) -> int:
    """Prints the matrix; 1 when access that the driver claims does not work or was not tried."""
    from ..peer_access.p2p import survey
    from ..peer_access.topology import RankFacts, Unknown, VisibleGpu, decide, probe_host
    from ..settings import Settings
    from .p2p_report import as_json, as_text, broken, plot

    settings = dataclasses.replace(
        Settings.from_environment(), p2p_probe_timeout_s=float(args.deadline)
    )
    gpus = _visible(settings)
    if isinstance(gpus, Unknown):
        print(json.dumps({"error": str(gpus)}) if args.json else f"p2p-check: {gpus}")
        return 1
    if len(gpus) < 2:
        text = f"{len(gpus)} GPU is visible; peer access needs two"
        print(json.dumps({"error": text}) if args.json else f"p2p-check: {text}")
        return 0
    pairs = len(gpus) * (len(gpus) - 1)
    print(f"trying {pairs} pairs of GPUs, at most {args.deadline:g} s", file=sys.stderr)
    results = survey(gpus, settings, refresh=args.refresh, measure=not args.no_measure)
    proofs = {p: one.failure for p, one in results.items() if not isinstance(one.failure, Unknown)}
    ranks = [RankFacts(i, probe_host(), VisibleGpu(gpu)) for i, gpu in enumerate(gpus)]
    verdict = decide(ranks, proofs)
    if args.json:
        print(json.dumps(as_json(gpus, results, verdict), indent=1))
    else:
        print(as_text(gpus, results, verdict))
    if args.plot:
        plot(gpus, results, args.plot)
    return 1 if broken(gpus, results) else 0


def _visible(settings: Settings) -> list[GpuFacts] | Unknown:
    """The GPUs that CUDA may use here, each once; MIG instances have no peer access."""
    from ..peer_access.topology import Unknown, probe_gpus, visible_gpus

    gpus = probe_gpus()
    if isinstance(gpus, Unknown):
        return gpus
    visible = visible_gpus(gpus, settings.cuda_visible_devices, settings.cuda_device_order)
    if isinstance(visible, Unknown):
        return visible
    return [one.gpu for one in visible if not one.mig]
