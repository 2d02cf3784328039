"""The file that remembers which pairs of GPUs were proven to reach each other's memory.

One JSON file a boot and driver, to be read by hand; deleting it, or `communicators p2p-check
--refresh`, makes the pairs be tried again. It is replaced as a whole, never written in place.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from .base import Refusal
from .topology import GpuFacts, HostFacts

_T = TypeVar("_T", str, int)

#: (accessor, owner): the first reaches for the memory of the second.
Pair = tuple[_T, _T]

_FORMAT = 2
_log = logging.getLogger(__name__)


def _default_folder() -> Path:
    try:
        return Path.home() / ".cache" / "communicators"
    except RuntimeError:  # a container's user without a home
        return Path(tempfile.gettempdir()) / f"communicators-{os.getuid()}"


@dataclass(frozen=True)
class PairResult:
    """What is known of an ordered pair: None or why it failed, and what was measured, by name."""

    failure: Refusal | None
    measured: Mapping[str, float] = field(default_factory=dict)


class P2PCache:
    """The proofs of one host since its last boot, under one driver, by the GPUs' UUIDs.

    Args:
        directory: where the file is; "" for ~/.cache/communicators, or under /tmp without a home.
        driver: version of the driver.
    """

    def __init__(self, directory: str, host: HostFacts, driver: str) -> None:
        folder = Path(directory) if directory else _default_folder()
        self.host, self.driver = host, driver
        label = re.sub(r"[^\w.-]", "_", f"p2p-{host.boot_id}-{driver}.json")
        self.path = folder / label

    def read(self) -> dict[tuple[str, str], PairResult]:
        """What is known; nothing from a file that is absent or not of this format, boot, driver."""
        try:
            content: dict[str, Any] = json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        expected = (_FORMAT, self.host.boot_id, self.driver)
        if not isinstance(content, dict) or expected != tuple(
            content.get(key) for key in ("format", "boot_id", "driver")
        ):
            return {}
        return {
            (one["accessor"], one["owner"]): PairResult(
                None if one["works"] else Refusal(one["reason"]), one["measured"]
            )
            for one in content["pairs"]
        }

    def add(self, results: Mapping[tuple[str, str], PairResult], gpus: Sequence[GpuFacts]) -> None:
        """Adds results to the file. Two jobs that add at once keep both; a reader never sees half.

        Where the file cannot be written a warning is logged, and the next job tries the pairs anew.
        """
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(self.path.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._replace({**self.read(), **results}, gpus)
        except OSError as error:
            _log.warning("proofs of peer access are not remembered: %s", error)

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
