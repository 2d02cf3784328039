"""``python -m scripts.tp_llama``: start the ranks, or be one of them under torchrun."""

from __future__ import annotations

import os
import sys

from .errors import JobError
from .options import device_kind, parser, say, world_size


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    under_torchrun = "WORLD_SIZE" in os.environ
    if under_torchrun and not options.verify:
        from . import job

        return job.main(options)
    try:
        if options.verify:
            if under_torchrun:
                raise JobError("--verify starts its own runs; start it without torchrun")
            from .verify import verify

            return verify(options)
        from .launch import launch

        ranks = world_size(options.tp, device_kind(options.device))
        return launch(ranks, arguments)
    except JobError as error:
        say(f"error: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
