"""The one format of what a benchmark finds: when, where and how, and a row of figures a case."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...errors import InvalidArgumentError

SCHEMA = 1
_ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Row:
    """Figures of several systems for one thing that was measured.

    Attributes:
        key: what was measured; rows of two runs with equal keys are compared.
        values: system -> figure, in `unit`.
        notes: what is shown beside them, and not compared.
        least: the smallest figure of all rounds, where `values` are medians of them; not shown.
    """

    key: dict[str, Any]
    values: dict[str, float]
    unit: str = "us"
    more_is_better: bool = False
    notes: dict[str, Any] = field(default_factory=dict)
    least: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """One run of one case. `ours` are the systems that are this project's; the others are peers."""

    case: str
    ours: tuple[str, ...]
    date: str
    commit: str
    command: str
    driver: str
    machine: dict[str, Any]
    rows: tuple[Row, ...] = ()

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n")


def read(path: Path) -> Record:
    """The record in a file; InvalidArgumentError for a file that holds none."""
    try:
        found = json.loads(path.read_text())
        if found.pop("schema") != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA}")
        rows = tuple(Row(**row) for row in found.pop("rows"))
        return Record(**{**found, "ours": tuple(found["ours"])}, rows=rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidArgumentError(
            f"{path} holds no figures of a benchmark; a file that --json wrote is accepted: {error}"
        ) from error


def compare(old: Record, new: Record, tolerance: float) -> tuple[list[tuple[str, ...]], bool]:
    """(what was measured, system, old, new, new / old) a figure that both have, and whether all of
    ours are within the tolerance: at most 1 + tolerance times as bad as before."""
    before = {json.dumps(row.key, sort_keys=True): row for row in old.rows}
    lines: list[tuple[str, ...]] = []
    held = True
    for row in new.rows:
        was = before.get(json.dumps(row.key, sort_keys=True))
        for name in row.values if was else ():
            if was is None or name not in was.values or not was.values[name]:
                continue
            ratio = row.values[name] / was.values[name]
            worse = not (1 / ratio if row.more_is_better and ratio else ratio) <= 1 + tolerance
            held &= not (worse and name in new.ours)
            what = " ".join(str(value) for value in row.key.values())
            figures = f"{was.values[name]:.4g}", f"{row.values[name]:.4g} {row.unit}"
            lines.append((what, name, *figures, f"{ratio:.2f}{', worse' if worse else ''}"))
    if not lines:
        raise InvalidArgumentError(
            f"nothing to compare: no figure of {new.case} at {new.commit} is in {old.case} at "
            f"{old.commit}; rows of the same op, sizes and ranks are compared"
        )
    return lines, held


def commit() -> str:
    """git's name of this checkout, or the version that is installed."""
    if (_ROOT / ".git").exists():
        command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return "unknown"
        return done.stdout.strip() or "unknown"
    try:
        return importlib.metadata.version("device-communicators")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def start(case: str, ours: Sequence[str], command: str, stated: str = "") -> Record:
    """The record of a run that begins now, on this machine, without rows.

    Args:
        stated: the commit, where git is not there to ask.
    """
    import torch

    from ...peer_access.topology import Unknown, probe_gpus

    gpus = probe_gpus() if torch.version.cuda or torch.version.hip else []
    known = [] if isinstance(gpus, Unknown) else gpus
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = {
        "cpu": f"{cpus} CPUs of {_cpu()}",
        "gpus": [gpu.name for gpu in known],
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    return Record(
        case=case,
        ours=tuple(ours),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        commit=stated or commit(),
        command=command,
        driver=known[0].driver if known else f"{platform.system()} {platform.release()}",
        machine=machine,
    )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())
