"""The ranks of a benchmark: processes on this machine, whose rows are read as they come."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ...errors import CommTimeoutError, CommunicatorError
from .record import Row

_GRACE_S = 5.0  # to end in, when asked to


def measured(
    module: str,
    world_size: int,
    options: argparse.Namespace,
    *,
    total: int = 0,
    prefix: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[Row]:
    """The rows that `module.measure(options)` yields on rank 0 of `world_size` new processes.

    A failing rank, or `options.timeout` seconds without an end, raises CommunicatorError.

    Args:
        total: how many rows are expected, for the progress that is printed before each.
        prefix: the command that starts all ranks at once, with OMPI_COMM_WORLD_RANK in each.
        environment: what the ranks have beside this process's own.
    """
    from torch._C._distributed_c10d import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    me = [sys.executable, "-m", f"{__package__}.rank", module, json.dumps(given)]
    # As torchrun tells its ranks who they are, and that the store is hosted for them.
    told = {
        **os.environ, **(environment or {}), "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    commands: list[tuple[list[str], dict[str, str]]] = [
        ([], {**told, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(world_size)
    ]
    if prefix:
        rank = "RANK=$OMPI_COMM_WORLD_RANK LOCAL_RANK=$OMPI_COMM_WORLD_RANK"
        commands = [([*prefix, "sh", "-c", f'export {rank}; exec "$0" "$@"'], told)]
    ranks: list[subprocess.Popen[str]] = []
    late = threading.Event()

    def stop() -> None:
        late.set()
        for process in ranks:
            process.terminate()  # mpirun ends its ranks then

    limit = threading.Timer(options.timeout, stop)
    limit.daemon = True
    try:
        for number, (before, env) in enumerate(commands):
            to = subprocess.DEVNULL if number else subprocess.PIPE
            ranks.append(subprocess.Popen([*before, *me], env=env, stdout=to, text=True))
        limit.start()
        yield from _read(ranks[0], total)
        failed = {number: code for number, one in enumerate(ranks) if (code := one.wait())}
    finally:
        limit.cancel()
        for process in ranks:
            process.terminate()
        for process in ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
            process.kill()
            process.wait()
    if late.is_set():
        raise CommTimeoutError(
            f"the {world_size} ranks had not finished after {options.timeout:g} s and were ended; "
            "a larger --timeout or fewer --sizes are accepted"
        )
    if failed:
        status = ", ".join(f"rank {number} ended with {code}" for number, code in failed.items())
        raise CommunicatorError(f"not all of {world_size} ranks finished: {status}")


def _read(process: subprocess.Popen[str], total: int) -> Iterator[Row]:
    assert process.stdout is not None
    done = 0
    for text in process.stdout:
        if text.startswith('{"key": '):
            done += 1
            print(f"[{done}/{total}] " if total else "", end="")
            yield Row(**json.loads(text))
        elif not text.startswith("[Gloo]"):
            print(text, end="", flush=True)
