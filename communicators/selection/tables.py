"""Measured rows: how long each communicator took for an op, dtype, mode and size on a machine.

One JSON file per machine shape, in `communicators/selection/data/` or in COMMUNICATORS_TABLE_DIR.
Only `communicators tune` writes them; they are data, and never edited by hand. Format:

    {"machine":  {"device": "NVIDIA H200", "link": "NV18", "world_size": 2},
     "measured": {"date": "...", "driver": "...", "commit": "...", "command": "..."},
     "merged": false,
     "rows": [{"op": "all_reduce", "dtype": "bfloat16", "mode": "capture", "up_to_bytes": 65536,
               "communicator": "custom_all_reduce", "us": {"custom_all_reduce": 2.1, ...}}, ...]}

The times of a row were measured at `up_to_bytes`, and policy.py chooses by them; `communicator` is
what it chose when the row was written. Which times speak for a request:

- A reduction is found by its dtype, or by another one of the same item size and kind, which takes
  the same bytes through the same kernels. Every other op moves bytes: the rows of all dtypes are
  one list, and of several times at one size the smallest counts.
- "merged": false: there is a row for every measured size. Between two of them a communicator's time
  lies on the line through its two times.
- "merged": true, or absent (tables from before): a row stands for every size above the row before
  it as well, where only the communicator that won is known, and not how long it took.
- Sizes beyond the largest row are judged by it, and sizes below the smallest one by that.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import torch

from ..base import MODES, OPS, REDUCTIONS, Request, dtype_name, size_name
from ..errors import SettingsError

_LARGEST_FILE = 16 << 20
_MOST = 1 << 50  # of bytes of a message, and of us


@dataclass(frozen=True)
class Row:
    """`communicator` was chosen for these requests; `us` holds every candidate's time."""

    op: str
    dtype: str
    mode: str
    up_to_bytes: int
    communicator: str
    us: dict[str, float]


@dataclass(frozen=True)
class Times:
    """What was measured that speaks for a request: us of each communicator, and `where`."""

    us: dict[str, float]
    where: str  # "at 64 KB", "between 1 MB and 2 MB", "at 64 KB of bfloat16"


@dataclass(frozen=True)
class Table:
    """The rows of one machine shape. `digest` is equal on two ranks only if the contents are."""

    machine: dict[str, Any]
    measured: dict[str, str]
    rows: tuple[Row, ...]
    digest: str
    source: str
    merged: bool = True

    def times(self, request: Request) -> Times | None:
        """The measured times that speak for `request`, or None."""
        of, points = self._points(request.op, request.dtype, request.mode)
        if not points:
            return None
        sizes = sorted(points)
        of = f" of {of}" if of else ""
        above = bisect_left(sizes, request.nbytes)
        high = sizes[min(above, len(sizes) - 1)]
        if self.merged or request.nbytes == high or above in (0, len(sizes)):
            return Times(points[high], f"at {size_name(high)}{of}")
        low = sizes[above - 1]
        part = (request.nbytes - low) / (high - low)
        below, beyond = points[low], points[high]
        us = {name: below[name] + part * (beyond[name] - below[name])
              for name in below if name in beyond}  # fmt: skip
        return Times(us, f"between {size_name(low)} and {size_name(high)}{of}")

    def bounds(self, op: str, dtype: torch.dtype, mode: str, margin: float) -> set[int]:
        """The sizes after which the choice may be another: of the rows, and where two lines cross.

        Args:
            margin: two communicators are taken to cross where one's time is `margin` times the
                other's.
        """
        _, points = self._points(op, dtype, mode)
        found = set(points)
        if self.merged:
            return found
        for low, high in pairwise(sorted(points)):
            below, beyond = points[low], points[high]
            # What has one of the two times alone counts at that end, and not between.
            if below.keys() != beyond.keys():
                found.add(high - 1)
            for a, b in permutations(below.keys() & beyond.keys(), 2):
                before = below[a] - margin * below[b]
                after = beyond[a] - margin * beyond[b]
                if before * after < 0:
                    found.add(low + int((high - low) * before / (before - after)))
        return found

    def describe(self) -> str:
        """'2 x NVIDIA H200 NV18, 2026-11-22'."""
        shape = f"{self.machine['world_size']} x {self.machine['device']}"
        return f"{shape} {self.machine.get('link', '')}".strip() + f", {self.measured['date']}"

    def _points(
        self, op: str, dtype: torch.dtype, mode: str
    ) -> tuple[str, dict[int, dict[str, float]]]:
        """(the dtype whose rows stand in, or "", us of each communicator by size)."""
        rows = [row for row in self.rows if (row.op, row.mode) == (op, mode)]
        stands_in = ""
        if op in REDUCTIONS:
            name = dtype_name(dtype)
            if not any(row.dtype == name for row in rows):
                alike = sorted({row.dtype for row in rows if _alike(row.dtype, dtype)})
                stands_in = name = alike[0] if alike else ""
            rows = [row for row in rows if row.dtype == name]
        points: dict[int, dict[str, float]] = {}
        for row in rows:
            point = points.setdefault(row.up_to_bytes, {})
            for communicator, us in row.us.items():
                point[communicator] = min(us, point.get(communicator, math.inf))
        return stands_in, points


EMPTY = Table({"device": "", "world_size": 0}, {"date": ""}, (), "none", "no table")


def _dtype(name: str) -> torch.dtype | None:
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) and dtype_name(found) == name else None


def _alike(name: str, dtype: torch.dtype) -> bool:
    other = _dtype(name)
    return (
        other is not None
        and other.itemsize == dtype.itemsize
        and other.is_floating_point == dtype.is_floating_point
        and other.is_complex == dtype.is_complex
    )


def parse(text: str, source: str) -> Table:
    """Validates the text of a table; SettingsError names the file, the row and the field."""
    try:
        data = json.loads(text)
        canonical = json.dumps(data, sort_keys=True)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{source} is not JSON: {error}") from None
    machine = _need(source, "the table", data, "machine", dict)
    _need(source, "machine", machine, "device", str)
    _need(source, "machine", machine, "world_size", int)
    if not isinstance(machine.get("link", ""), str):
        _need(source, "machine", machine, "link", str)
    measured = _need(source, "the table", data, "measured", dict)
    for key in ("date", "driver", "commit", "command"):
        _need(source, "measured", measured, key, str)
    merged = _need(source, "the table", {"merged": True, **data}, "merged", bool)
    rows = [
        _row(source, f"row {number}", item)
        for number, item in enumerate(_need(source, "the table", data, "rows", list))
    ]
    digest = hashlib.sha256(canonical.encode()).hexdigest()[:16]
    return Table(machine, measured, tuple(rows), digest, source, merged)


def _need(source: str, where: str, holder: Any, key: str, kind: type) -> Any:
    value = holder.get(key) if isinstance(holder, dict) else None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:60] + "..."
        raise SettingsError(f"{source}: {where} needs {key!r} of type {kind.__name__}, got {shown}")
    return value


def _row(source: str, where: str, item: Any) -> Row:
    us = _need(source, where, item, "us", dict)
    row = Row(
        op=_need(source, where, item, "op", str),
        dtype=_need(source, where, item, "dtype", str),
        mode=_need(source, where, item, "mode", str),
        up_to_bytes=_need(source, where, item, "up_to_bytes", int),
        communicator=_need(source, where, item, "communicator", str),
        us={name: _time(source, where, us, name) for name in us},
    )
    if row.op not in OPS or row.mode not in MODES or not 0 < row.up_to_bytes < _MOST:
        raise SettingsError(
            f"{source}: {where} has op {row.op!r}, mode {row.mode!r}, up_to_bytes "
            f"{row.up_to_bytes}; accepted are {OPS}, {MODES} and a positive size below 2**50"
        )
    if _dtype(row.dtype) is None:
        raise SettingsError(f"{source}: {where} has dtype {row.dtype!r}, which torch does not know")
    if row.communicator not in us:
        raise SettingsError(
            f"{source}: {where} names {row.communicator!r}, of which its 'us' has no time"
        )
    return row


def _time(source: str, where: str, us: dict[str, Any], name: str) -> float:
    value = us[name]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < _MOST:
        return float(value)
    raise SettingsError(
        f"{source}: {where} has a time of {str(value)[:60]} for {name!r}; positive us are accepted"
    )


def load(
    device: str, link: str, world_size: int, directories: Iterable[Path] | None = None
) -> Table:
    """The first table for this machine shape, or EMPTY.

    Args:
        device: the product name that the driver reports, for example "NVIDIA H200".
        link: "NV<n>" for n NVLinks between each pair, "" when there are none.
        directories: where to look, in order; default: the tables that ship. Of files for the same
            shape in one directory the first by name counts.

    Raises SettingsError, with the file's name, when a directory is not one, or when any of its
    *.json cannot be read or is no table: a table that was meant and is not used would go unnoticed.
    """
    if directories is None:
        directories = [Path(__file__).with_name("data")]
    shape = (device, link, world_size)
    for directory in directories:
        try:
            names = sorted(name for name in os.listdir(directory) if name.endswith(".json"))
        except OSError as error:
            raise SettingsError(
                f"{directory} is no directory that tables can be read from: {error.strerror}"
            ) from error
        found = [read(Path(directory) / name) for name in names]
        for table in found:
            machine = table.machine
            if (machine["device"], machine.get("link", ""), machine["world_size"]) == shape:
                return table
    return EMPTY


def read(path: Path) -> Table:
    """The table in the file `path`; SettingsError with its name for whatever else is there."""
    try:
        facts = os.stat(path)  # looked at first: opening a pipe would wait for who writes to it
        if not stat.S_ISREG(facts.st_mode):
            raise SettingsError(f"{path} is no regular file; a table is one")
        if facts.st_size > _LARGEST_FILE:
            raise SettingsError(
                f"{path} has {facts.st_size} bytes; a table has at most {_LARGEST_FILE}"
            )
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not JSON: {error}") from None
    return parse(text, str(path))
