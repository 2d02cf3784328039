"""Measured rows: which communicator was fastest for an op, dtype, mode and size on a machine shape.

One JSON file a machine shape, in `communicators/tables/` or in COMMUNICATORS_TABLE_DIR. Only
`communicators tune` writes them; they are data, and never edited by hand. Format:

    {"machine":  {"device": "NVIDIA H200", "link": "NV18", "world_size": 2},
     "measured": {"date": "...", "driver": "...", "commit": "...", "command": "..."},
     "rows": [{"op": "all_reduce", "dtype": "bfloat16", "mode": "capture", "up_to_bytes": 65536,
               "communicator": "custom_all_reduce", "us": {"custom_all_reduce": 2.1, ...}}, ...]}

A row holds for sizes above the previous row of its (op, dtype, mode) up to `up_to_bytes`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .base import MODES, OPS, Request, dtype_name
from .errors import SettingsError


@dataclass(frozen=True)
class Row:
    """`communicator` was the fastest for these requests; `us` holds every candidate's time."""

    op: str
    dtype: str
    mode: str
    up_to_bytes: int
    communicator: str
    us: dict[str, float]


@dataclass(frozen=True)
class Table:
    """The rows of one machine shape. `digest` is equal on two ranks only if the contents are."""

    machine: dict[str, Any]
    measured: dict[str, str]
    rows: tuple[Row, ...]
    digest: str
    source: str

    def find(self, request: Request) -> Row | None:
        """The row for `request`: exact op, dtype and mode, smallest size bound that holds it."""
        fitting = [
            row
            for row in self.rows
            if (row.op, row.dtype, row.mode)
            == (request.op, dtype_name(request.dtype), request.mode)
            and request.nbytes <= row.up_to_bytes
        ]
        return min(fitting, key=lambda row: row.up_to_bytes, default=None)

    def describe(self) -> str:
        """'2 x NVIDIA H200 NV18, 2026-11-22'."""
        shape = f"{self.machine['world_size']} x {self.machine['device']}"
        return f"{shape} {self.machine.get('link', '')}".strip() + f", {self.measured['date']}"


EMPTY = Table({"device": "", "world_size": 0}, {"date": ""}, (), "none", "no table")


def parse(text: str, source: str) -> Table:
    """Validates the text of a table; SettingsError names the file, the row and the field."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise SettingsError(f"{source} is not JSON: {error}") from None

    def need(where: str, holder: Any, key: str, kind: type | tuple[type, ...]) -> Any:
        value = holder.get(key) if isinstance(holder, dict) else None
        if not isinstance(value, kind):
            raise SettingsError(f"{source}: {where} needs {key!r} of type {kind}, got {value!r}")
        return value

    machine = need("the table", data, "machine", dict)
    need("machine", machine, "device", str)
    need("machine", machine, "world_size", int)
    measured = need("the table", data, "measured", dict)
    for key in ("date", "driver", "commit", "command"):
        need("measured", measured, key, str)
    rows = []
    for number, item in enumerate(need("the table", data, "rows", list)):
        where = f"row {number}"
        row = Row(
            op=need(where, item, "op", str),
            dtype=need(where, item, "dtype", str),
            mode=need(where, item, "mode", str),
            up_to_bytes=need(where, item, "up_to_bytes", int),
            communicator=need(where, item, "communicator", str),
            us={k: float(v) for k, v in need(where, item, "us", dict).items()},
        )
        if row.op not in OPS or row.mode not in MODES or row.up_to_bytes <= 0:
            raise SettingsError(
                f"{source}: {where} has op {row.op!r}, mode {row.mode!r}, up_to_bytes "
                f"{row.up_to_bytes}; accepted are {OPS}, {MODES} and a positive size"
            )
        rows.append(row)
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
    return Table(machine, measured, tuple(rows), digest, source)


def load(
    device: str, link: str, world_size: int, directories: Iterable[Path] | None = None
) -> Table:
    """The first table for this machine shape, or EMPTY.

    Args:
        device: the product name that the driver reports, for example "NVIDIA H200".
        link: "NV<n>" for n NVLinks between each pair, "" when there are none.
        directories: where to look, in order; default: the tables that ship.
    """
    if directories is None:
        directories = [Path(__file__).with_name("tables")]
    shape = (device, link, world_size)
    for directory in directories:
        for path in sorted(Path(directory).glob("*.json")):
            table = parse(path.read_text(), str(path))
            machine = table.machine
            if (machine["device"], machine.get("link", ""), machine["world_size"]) == shape:
                return table
    return EMPTY
