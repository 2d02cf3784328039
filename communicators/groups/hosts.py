"""Who this process is: which running kernel, which namespaces, which user.

A container may hide /proc. Then the boot id is replaced by the host's name and a namespace by
nothing, and `missing()` says so for explain() and the doctor; nothing raises.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class Home:
    """Where a process runs. Equal homes: one kernel, one network, one user."""

    boot_id: str  # of the running kernel; the host's name where it is hidden
    network: str  # network namespace, "" where it is hidden
    user: int

    @classmethod
    def mine(cls) -> Home:
        return cls(boot_id(), namespace("net"), os.getuid())


def boot_id() -> str:
    """Equal in two processes if and only if one kernel runs them, as far as that can be known."""
    try:
        found = (PROC / "sys/kernel/random/boot_id").read_text().strip()
    except (OSError, UnicodeDecodeError):
        found = ""
    return found or f"host {socket.gethostname()}"


def namespace(kind: str) -> str:
    """This process's namespace of a kind (namespaces(7): "pid", "net"), "" where it is hidden."""
    try:
        return os.readlink(PROC / "self/ns" / kind)
    except OSError:
        return ""


def missing() -> str:
    """What of this is hidden here and what stands in for it, as a sentence; "" when nothing is."""
    hidden = []
    if boot_id().startswith("host "):
        hidden.append("no boot id (the host's name stands in for it)")
    hidden += [f"no {kind} namespace" for kind in ("net", "pid") if not namespace(kind)]
    if not hidden:
        return ""
    return f"{PROC} does not tell everything here: {', '.join(hidden)}"
