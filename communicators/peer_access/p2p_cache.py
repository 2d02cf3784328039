"""The file that remembers which pairs of GPUs were proven to reach each other's memory.

One JSON file per boot and driver, to be read by hand; deleting it, or `communicators p2p-check
--refresh`, makes the pairs be tried again. It is replaced as a whole, never written in place.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import logging
import os
import re
import stat
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..base import Refusal
from .topology import GpuFacts, HostFacts

_T = TypeVar("_T", str, int)

#: (accessor, owner): the first reaches for the memory of the second.
Pair = tuple[_T, _T]

_FORMAT = 2
_log = logging.getLogger(__name__)


_LOCK_S = 5.0
_MOST_BYTES = 16 << 20  # thousands of pairs; nobody reads more


def _folder(directory: str) -> tuple[Path, str]:
    """Where proofs are kept, and why not in the user's home ("" when they are, or told where)."""
    if directory:
        return Path(directory), ""
    try:
        home = Path.home()
    except RuntimeError:  # a container's user without one
        home = Path()
    if home.is_absolute() and home.is_dir() and os.access(home, os.W_OK):
        return home / ".cache" / "communicators", ""
    where = Path(tempfile.gettempdir()) / f"communicators-{os.getuid()}"
    return where, f"proofs of peer access are kept in {where}: HOME={home} cannot be written"


def folder_problem(directory: str) -> str:
    """What is unusual about the folder of the proofs here, as a sentence; "" when nothing is."""
    folder, reason = _folder(directory)
    there = next(one for one in (folder, *folder.parents) if os.path.exists(one))
    if not os.path.isdir(there) or not os.access(there, os.W_OK):
        return f"proofs of peer access are not remembered: {there} is no directory to write in"
    return reason


@dataclass(frozen=True)
class PairResult:
    """What is known of an ordered pair: None or why it failed, and what was measured, by name."""

    failure: Refusal | None
    measured: Mapping[str, float] = field(default_factory=dict)


class P2PCache:
    """The proofs of one host since its last boot, under one driver, by the GPUs' UUIDs.

    Args:
        directory: where the file is; "" for ~/.cache/communicators, or under /tmp where the home
            cannot be written.
        driver: version of the driver.
    """

    def __init__(self, directory: str, host: HostFacts, driver: str) -> None:
        folder, _ = _folder(directory)
        self.host, self.driver = host, driver
        label = re.sub(r"[^\w.-]", "_", f"p2p-{host.boot_id}-{driver}.json")
        self.path = folder / label

    def read(self) -> dict[tuple[str, str], PairResult]:
        """What is known; nothing from a file that is absent or not of this format, boot, driver."""
        try:
            return self._parse(_read_regular(self.path))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            _log.warning(
                "%s is not used, and the pairs are tried anew: %s: %s",
                self.path,
                type(error).__name__,
                error,
            )
            return {}

    def _parse(self, text: bytes) -> dict[tuple[str, str], PairResult]:
        content: dict[str, Any] = json.loads(text)
        found = tuple(content.get(key) for key in ("format", "boot_id", "driver"))
        if found != (_FORMAT, self.host.boot_id, self.driver):
            return {}
        return {
            (str(one["accessor"]), str(one["owner"])): PairResult(
                None if _truth(one["works"]) else Refusal(str(one["reason"])),
                {str(name): float(value) for name, value in one["measured"].items()},
            )
            for one in content["pairs"]
        }

    def add(self, results: Mapping[tuple[str, str], PairResult], gpus: Sequence[GpuFacts]) -> None:
        """Adds results to the file. Two jobs that add at once keep both; a reader never sees half.

        Where the file cannot be written a warning is logged, and the next job tries the pairs anew.
        """
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC  # a FIFO must not block
            with open(os.open(self.path.with_suffix(".lock"), flags, 0o600), "w") as lock:
                _lock(lock.fileno())
                self._replace({**self.read(), **results}, gpus)
        except OSError as error:
            _log.warning("proofs of peer access are not remembered in %s: %s", self.path, error)

    def _replace(
        self, results: Mapping[tuple[str, str], PairResult], gpus: Sequence[GpuFacts]
    ) -> None:
        content = {
            "format": _FORMAT,
            "host": self.host.name,
            "boot_id": self.host.boot_id,
            "driver": self.driver,
            "written": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "gpus": [
                {"index": gpu.index, "uuid": gpu.uuid, "name": gpu.name, "pci": gpu.pci_bus_id}
                for gpu in gpus
            ],
            "pairs": [
                {
                    "accessor": accessor,
                    "owner": owner,
                    "works": one.failure is None,
                    "reason": str(one.failure or ""),
                    "measured": dict(one.measured),
                }
                for (accessor, owner), one in sorted(results.items())
            ],
        }
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as file:
            json.dump(content, file, indent=1)
        try:
            os.replace(file.name, self.path)
        finally:
            Path(file.name).unlink(missing_ok=True)


def _read_regular(path: Path) -> bytes:
    """The content of a file, and OSError for what is none: a directory, a FIFO, a huge one."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError("it is not a regular file")
        if found.st_size > _MOST_BYTES:
            raise OSError(f"it has {found.st_size} bytes, more than {_MOST_BYTES}")
        return file.read(_MOST_BYTES)


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"works is {value!r}")
    return value


def _lock(descriptor: int) -> None:
    """flock with a limit: the holder may be stopped."""
    until = time.monotonic() + _LOCK_S
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)
