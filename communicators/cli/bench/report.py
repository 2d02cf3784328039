"""What a benchmark shows: a line a row while it runs, then a table, a plot, what has changed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ...errors import InvalidArgumentError, SettingsError
from .record import Record, Row

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_size(text: str) -> int:
    """Bytes, with K, M or G."""
    return int(text[:-1]) * _UNITS[text[-1]] if text[-1:] in _UNITS else int(text)


def size_name(nbytes: int) -> str:
    for unit, shift in (("MB", 20), ("KB", 10)):
        if nbytes >= 1 << shift:
            return f"{nbytes / (1 << shift):.4g} {unit}"
    return f"{nbytes} B"


def busbw(row: Row, name: str) -> float | None:
    """GB/s, as nccl-tests defines it: the bytes that must cross between ranks, by the time.

    None where the row is no collective's, or not the time of one call alone.
    """
    if not {"op", "bytes", "ranks"} <= set(row.key) or row.key.get("timed", "graph") != "graph":
        return None
    w = row.key["ranks"]
    of_op = {"all_reduce": 2 / w, "all_to_all": 1 / w}
    factor = (w - 1) * of_op.get(row.key["op"], 1)
    return float(row.key["bytes"] * factor / row.values[name] / 1e3) if name in row.values else None


def ratio(row: Row, ours: str, peer: str) -> float | None:
    """How many times better ours is than a peer."""
    a, b = row.values.get(ours), row.values.get(peer)
    if not a or not b:
        return None
    return a / b if row.more_is_better else b / a


def line(row: Row, ours: tuple[str, ...]) -> str:
    """One row, as it is printed while the others are still measured."""
    first = next((name for name in ours if name in row.values), "")
    parts = []
    for name, value in row.values.items():
        times = None if name in ours else ratio(row, first, name)
        parts.append(f"{name} {_number(value)}" + (f" ({times:.1f} x)" if times else ""))
    unit = f" {row.unit}" if row.unit else ""
    notes = [f"; {name}: {_text(value)}" for name, value in row.notes.items() if value != ""]
    return f"{' '.join(_keys(row))}: {', '.join(parts)}{unit}{''.join(notes)}"


def table(record: Record) -> list[str]:
    """Markdown. A column for each part of the key, system, note, and ratio of ours to a peer."""
    rows = record.rows
    units = list(dict.fromkeys(row.unit for row in rows))
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    names.sort(key=lambda name: name not in record.ours)
    first = names[0] if names and names[0] in record.ours else ""
    keys = list(dict.fromkeys(name for row in rows for name in row.key))
    notes = list(dict.fromkeys(name for row in rows for name in row.notes))
    peers = [n for n in names if n not in record.ours and any(ratio(r, first, n) for r in rows)]
    wide = any(busbw(row, first) for row in rows)
    unit = f", {units[0]}" if len(units) == 1 and units[0] else ""
    heads = [*keys, *(["unit"] if len(units) > 1 else []), *(f"{name}{unit}" for name in names)]
    heads += [*(["busbw, GB/s"] if wide else []), *(f"x {name}" for name in peers), *notes]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [_cell(row.key.get(key, ""), key) for key in keys]
        cells += [row.unit] if len(units) > 1 else []
        cells += [_number(row.values.get(name)) for name in names]
        cells += [_number(busbw(row, first))] if wide else []
        for name in peers:
            times = ratio(row, first, name)
            cells.append("-" if times is None else f"{times:.1f}")
        cells += [_text(row.notes.get(note, "")) for note in notes]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def headline(record: Record) -> str:
    machine = dict(record.machine)
    gpus, load = machine.pop("gpus", []), machine.pop("load_average", 0.0)
    where = [f"{len(gpus)} x {gpus[0]}"] if gpus else []
    where += [str(machine.pop("cpu", ""))]
    where += [f"{name} {_text(value)}" for name, value in machine.items()]
    busy = "; other work was running, compare within a row" if load > 0.5 else ""
    return (
        f"`{record.command}` on {record.date}, commit {record.commit}: {', '.join(where)}, driver "
        f"{record.driver}. Load average when it started: {load:.1f}{busy}."
    )


def markdown(record: Record, about: str, summary: str, plot: Path | None) -> str:
    title, _, text = about.strip().partition("\n")
    parts = [f"# {title.rstrip('.')}", headline(record), text.strip(), "\n".join(table(record))]
    parts += [summary.strip(), f"![{record.case}]({plot.name})" if plot else ""]
    return "\n\n".join(part for part in parts if part) + "\n"


def figure_module() -> Any:
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise SettingsError(
            f"--plot needs matplotlib (pip install device-communicators[plot]): {error}"
        ) from error


def plot(record: Record, path: Path) -> None:
    """Figures over bytes, both logarithmic; a panel for each other key (op, dtype, ranks)."""
    panels: dict[str, list[Row]] = {}
    for row in record.rows:
        if "bytes" in row.key:
            panels.setdefault(" ".join(_keys(row, but="bytes")), []).append(row)
    if not panels:
        raise InvalidArgumentError(
            f"--plot draws figures over bytes, and {record.case} has none; all_reduce, "
            "quick_all_reduce and cpu are accepted"
        )
    wide = min(3, len(panels))
    high = -(-len(panels) // wide)
    figure = figure_module().Figure(figsize=(6 * wide, 4.5 * high), layout="constrained")
    grid = figure.subplots(high, wide, squeeze=False).flat
    for axes, (title, rows) in zip(grid, panels.items(), strict=False):
        for name in dict.fromkeys(name for row in rows for name in row.values):
            points = [(row.key["bytes"], row.values[name]) for row in rows if name in row.values]
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(xscale="log", yscale="log", xlabel="bytes", ylabel=rows[0].unit, title=title)
        axes.grid(alpha=0.3)
        axes.legend()
    for axes in list(grid):
        axes.remove()
    figure.savefig(path, dpi=120)


def _keys(row: Row, but: str = "") -> list[str]:
    return [_cell(value, key) for key, value in row.key.items() if key != but]


def _cell(value: object, key: str) -> str:
    return size_name(value) if key == "bytes" and isinstance(value, int) else str(value)


def _number(value: float | None) -> str:
    if value is None or value != value:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _text(value: object) -> str:
    return _number(value) if isinstance(value, float) else str(value)
