"""The `communicators` command: bench, doctor, p2p-check, tune. One module each, loaded on use."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

#: subcommand -> (module, what `--help` says). A module has add_arguments(parser) and run(args).
COMMANDS = {
    "bench": ("bench", "time the collectives on this machine beside NCCL, gloo and torch's own"),
    "doctor": ("doctor", "what this machine has, and which communicator serves each collective"),
    "p2p-check": ("p2p_check", "which GPU reaches which GPU's memory, and how fast"),
    "tune": ("tune", "measure the communicators on this machine and write its table"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status: 0 fine, 1 something is broken, 2 usage."""
    parser = argparse.ArgumentParser(prog="communicators", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=text, description=text)
        importlib.import_module(f".{module}", __name__).add_arguments(subparser)
    given = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(given, argparse.Namespace(given=given))
    return importlib.import_module(f".{COMMANDS[args.command][0]}", __name__).run(args)
