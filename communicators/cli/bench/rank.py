"""One rank of a benchmark, as launch.py starts it; rows are lines of JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from dataclasses import asdict

import torch.distributed as dist

from ...errors import CommunicatorError


def main(module: str, options: str) -> int:
    given = argparse.Namespace(**json.loads(options))
    try:
        for row in importlib.import_module(module).measure(given):
            if dist.get_rank() == 0:
                print(json.dumps(asdict(row)), flush=True)
    except CommunicatorError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
