"""Where the ranks of a job meet: env://, tcp:// and file:// addresses, with errors that name them.

torch's own rendezvous makes the stores. It waits inside C++ without a limit when somebody accepts
connections and never answers, so it is made in a call that can be left.
"""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from ..errors import CommTimeoutError, InvalidArgumentError, TopologyError
from .calls import attend

_GRACE_S = 0.5  # torch's own errors at the deadline say more than ours


def meet(url: str, rank: int, world_size: int, seconds: float) -> Store:
    """The store at `url`. Rank 0 hosts it, unless the launcher does (torchrun).

    Raises InvalidArgumentError or TopologyError for an address that nobody can meet at, and
    CommTimeoutError when nobody answers there.
    """
    where = _checked(url, rank)
    limit = datetime.timedelta(seconds=seconds)

    def make() -> Store:
        if urlsplit(url).scheme == "file":
            store: Store = next(iter(rendezvous(url, rank, world_size, timeout=limit)))[0]
            return store
        # As torch's own, which however waits in here until all ranks are connected, and does not
        # tell who is missing.
        host, _, port = where.split(" ")[0].rpartition(":")
        launcher_hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
        return TCPStore(
            host,
            int(port),
            world_size,
            is_master=rank == 0 and not launcher_hosts,
            timeout=limit,
            wait_for_workers=False,
            multi_tenant=not launcher_hosts,
            use_libuv=os.environ.get("USE_LIBUV", "1") == "1",
        )

    return reach(make, where, f"rank {rank} of {world_size}", seconds)


def reach(make: Callable[[], Store], where: str, who: str, seconds: float) -> Store:
    """make()'s store, which is at `where`, with errors of ours when that fails or takes too long.

    Args:
        who: whose error it is, at the beginning of the sentence.
    """
    try:
        store: Store = attend(make, seconds + _GRACE_S)
    except TimeoutError:
        raise CommTimeoutError(
            _unreachable(where, who, seconds)
            or f"{who}: {where} was reached and did not answer as a store of torch.distributed "
            f"within {seconds:g} s; either something else listens there, or the process that hosts "
            "the store is stopped"
        ) from None
    except dist.DistError as error:
        first = (str(error).splitlines() or [""])[0]
        if "failed to listen" in first or "EADDRINUSE" in first:
            raise InvalidArgumentError(
                f"{who}: cannot listen at {where}: {_listen_problem(str(error))}"
            ) from None
        raise CommTimeoutError(
            _unreachable(where, who, seconds)
            or f"{who}: the ranks did not all come to {where} within {seconds:g} s: {first}"
        ) from error
    except (RuntimeError, OSError, ValueError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise InvalidArgumentError(f"{who}: cannot meet at {where}: {first}") from error
    return store


def _unreachable(where: str, who: str, seconds: float) -> str:
    """A sentence when host:port, with which `where` begins, cannot be connected to, else ""."""
    problem = _connect_problem(where)
    told = f"{who}: nobody could be reached at {where} within {seconds:g} s: {problem}"
    return told if problem else ""


def _connect_problem(where: str) -> str:
    host, _, port = where.split(" ")[0].rpartition(":")
    if not port.isdigit():
        return ""
    try:
        attend(lambda: socket.create_connection((host.strip("[]"), int(port)), 0.5).close(), 1.0)
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return str(error.strerror or error)
    return ""


def _listen_problem(text: str) -> str:
    for name, sentence in (
        ("EADDRINUSE", "the port is in use (EADDRINUSE)"),
        ("EACCES", "the port is reserved (EACCES)"),
        ("EADDRNOTAVAIL", "it is not an address of this host (EADDRNOTAVAIL)"),
    ):
        if name in text:
            return sentence
    return (text.splitlines() or [""])[0]


def _checked(url: str, rank: int) -> str:
    """Refuses what nobody can meet at; the place, for errors."""
    if not isinstance(url, str):
        raise InvalidArgumentError(
            f"rank {rank}: distributed_init_method={url!r}: {_ACCEPTED} is expected"
        )
    parts = urlsplit(url)
    check = _CHECKS.get(parts.scheme)
    if check is None:
        raise InvalidArgumentError(
            f"rank {rank}: distributed_init_method={url!r}: {_ACCEPTED} is expected"
        )
    return check(url, parts, rank)


_ACCEPTED = "'env://', 'tcp://host:port' or 'file:///path'"


def _check_env(url: str, parts: SplitResult, rank: int) -> str:
    address = os.environ.get("MASTER_ADDR", "").strip()
    if not address:
        raise TopologyError(
            f"rank {rank}: MASTER_ADDR={os.environ.get('MASTER_ADDR')!r}; {url} takes from it the "
            "host name or address of rank 0 (torchrun sets it)"
        )
    return f"{address}:{integer_of_environment('MASTER_PORT', 1, 65535)} ({url})"


def _check_tcp(url: str, parts: SplitResult, rank: int) -> str:
    try:
        port = parts.port
    except ValueError:
        port = None
    if not parts.hostname or not port or parts.path.strip("/"):
        raise InvalidArgumentError(
            f"rank {rank}: distributed_init_method={url!r}: tcp://host:port with a port from 1 to "
            "65535 is expected"
        )
    return f"{parts.hostname}:{port}"


def _check_file(url: str, parts: SplitResult, rank: int) -> str:
    path = Path(parts.path)
    problem = ""
    if parts.netloc or not parts.path.startswith("/"):
        problem = "file:///path with an absolute path is expected"
    elif not path.parent.is_dir():
        problem = f"there is no directory {path.parent}"
    elif path.exists() and not path.is_file():
        problem = f"{path} is not a file"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        problem = f"{path if path.exists() else path.parent} cannot be written"
    if problem:
        raise InvalidArgumentError(f"rank {rank}: distributed_init_method={url!r}: {problem}")
    return url


_CHECKS: dict[str, Callable[[str, SplitResult, int], str]] = {
    "env": _check_env,
    "tcp": _check_tcp,
    "file": _check_file,
}


def integer_of_environment(variable: str, least: int, most: int | None = None) -> int:
    """The integer in an environment variable; TopologyError, naming it, for anything else."""
    text = os.environ.get(variable)
    if text is None:
        raise TopologyError(
            f"{variable} is not set; it takes an integer {_span(least, most)} (torchrun sets it)"
        )
    return checked_integer(variable, text, least, most)


def checked_integer(name: str, given: Any, least: int, most: int | None = None) -> int:
    """`given` as an integer of a range; TopologyError, naming it, for anything else."""
    try:
        value = int(given) if isinstance(given, str) and given.strip().isascii() else given
    except ValueError:
        value = None
    if (
        not isinstance(value, int)
        or isinstance(value, bool)
        or value < least
        or (most is not None and value > most)
    ):
        raise TopologyError(
            f"{name}={given!r} is not accepted; it takes an integer {_span(least, most)}"
        )
    return value


def _span(least: int, most: int | None) -> str:
    return f"of {least} or more" if most is None else f"from {least} to {most}"
