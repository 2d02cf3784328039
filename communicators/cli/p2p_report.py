"""What `communicators p2p-check` prints and draws, from facts and results alone."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..base import Refusal
from ..errors import SettingsError
from ..peer_access.p2p_cache import PairResult
from ..peer_access.topology import GpuFacts, Unknown, Verdict, probe_host

Results = Mapping[tuple[str, str], PairResult]

#: Measured numbers: name in the JSON -> title, format.
_MEASURED = {
    "latency_us": ("latency of a load, round trip, us", ".2f"),
    "read_gbps": ("read by the copy engine, GB/s", ".1f"),
    "write_gbps": ("write by the copy engine, GB/s", ".1f"),
}


def broken(gpus: Sequence[GpuFacts], results: Results) -> list[tuple[GpuFacts, GpuFacts, Refusal]]:
    """Pairs whose claim was disproven or could not be tried."""
    found = []
    for a in gpus:
        for b in gpus:
            if a is not b and (failure := results[a.uuid, b.uuid].failure) is not None:
                claim = a.peer(b.uuid)
                if claim is None or (claim.read is not False and claim.write is not False):
                    found.append((a, b, failure))
    return found


def as_json(gpus: Sequence[GpuFacts], results: Results, verdict: Verdict) -> dict[str, Any]:
    """Everything that is known, by name."""
    pairs = []
    for a in gpus:
        for b in gpus:
            if a is b:
                continue
            claim, one = a.peer(b.uuid), results[a.uuid, b.uuid]
            pairs.append(
                {
                    "accessor": a.index,
                    "owner": b.index,
                    "claimed_read": claim and claim.read,
                    "claimed_write": claim and claim.write,
                    "claimed_nvlink": claim and claim.nvlink,
                    "nvlinks": claim and claim.nvlinks,
                    "pcie_path": claim and claim.path,
                    "proven": None if isinstance(one.failure, Unknown) else one.failure is None,
                    "reason": str(one.failure or ""),
                    **{name: one.measured.get(name) for name in _MEASURED},
                }
            )
    host = probe_host()
    return {
        "host": host.name,
        "boot_id": host.boot_id,
        "driver": gpus[0].driver,
        "gpus": [
            {"index": gpu.index, "uuid": gpu.uuid, "name": gpu.name, "pci": gpu.pci_bus_id}
            for gpu in gpus
        ],
        "pairs": pairs,
        "p2p_refusal": str(verdict.p2p) if verdict.p2p else None,
        "nvlink_refusal": str(verdict.nvlink) if verdict.nvlink else None,
        "refusal": str(verdict.refusal) if verdict.refusal else None,
    }


def as_text(gpus: Sequence[GpuFacts], results: Results, verdict: Verdict) -> str:
    """The matrices, the failures and the verdict, to read."""
    lines = [f"{len(gpus)} GPUs on {probe_host().name}, driver {gpus[0].driver}"]
    lines += [f"  GPU {gpu.index}  {gpu.name}  {gpu.pci_bus_id}  {gpu.uuid}" for gpu in gpus]
    lines += ["", "row: the GPU that reads and writes; column: the GPU whose memory it is"]

    def matrix(title: str, cell: Callable[[GpuFacts, GpuFacts], str]) -> None:
        heads = [f"GPU {gpu.index}" for gpu in gpus]
        rows = [["-" if a is b else cell(a, b) for b in gpus] for a in gpus]
        width = max(len(text) for text in [*heads, *(text for row in rows for text in row)]) + 2
        lines.extend(["", title, " " * 8 + "".join(f"{head:>{width}}" for head in heads)])
        for head, row in zip(heads, rows, strict=True):
            lines.append(f"{head:8}" + "".join(f"{text:>{width}}" for text in row))

    def access(a: GpuFacts, b: GpuFacts) -> str:
        claim, failure = a.peer(b.uuid), results[a.uuid, b.uuid].failure
        both = None if claim is None or claim.read is None else claim.read and claim.write
        proven = None if isinstance(failure, Unknown) else failure is None
        return f"{_yes(both)}/{_yes(proven)}"

    def nvlinks(a: GpuFacts, b: GpuFacts) -> str:
        claim = a.peer(b.uuid)
        if claim is None:
            return "?"
        if claim.nvlinks:
            return f"NV{claim.nvlinks}"
        return "NVLink" if claim.nvlink else claim.path or "?"

    matrix("access, claimed/proven", access)
    matrix("connection", nvlinks)
    for name, (title, form) in _MEASURED.items():
        if any(name in one.measured for one in results.values()):

            def number(a: GpuFacts, b: GpuFacts, name: str = name, form: str = form) -> str:
                value = results[a.uuid, b.uuid].measured.get(name)
                return "?" if value is None else format(value, form)

            matrix(title, number)
    lines.append("")
    for a, b, failure in broken(gpus, results):
        lines.append(f"GPU {a.index} -> memory of GPU {b.index}: {failure}")
    lines.append(f"NVLink: {verdict.nvlink or 'connects every pair'}")
    lines.append(f"kernels on peers' memory: {verdict.refusal or 'may be used'}")
    return "\n".join(lines)


def _yes(value: bool | None) -> str:
    return "?" if value is None else "yes" if value else "NO"


def plot(gpus: Sequence[GpuFacts], results: Results, path: str) -> None:
    """A heat map of each measured number; SettingsError without matplotlib."""
    try:
        figure_module: Any = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise SettingsError(
            f"--plot needs matplotlib (pip install device-communicators[plot]): {error}"
        ) from error
    figure = figure_module.Figure(figsize=(4.5 * len(_MEASURED), 4), layout="constrained")
    names = [f"GPU {gpu.index}" for gpu in gpus]
    for axes, (name, (title, form)) in zip(
        figure.subplots(1, len(_MEASURED)), _MEASURED.items(), strict=True
    ):
        table = [
            [
                float("nan") if a is b else results[a.uuid, b.uuid].measured.get(name, float("nan"))
                for b in gpus
            ]
            for a in gpus
        ]
        # From zero, so that noise does not look like structure.
        highest = max((value for row in table for value in row if value == value), default=1.0)
        image = axes.imshow(table, cmap="Blues", vmin=0, vmax=1.3 * highest)
        for y, row in enumerate(table):
            for x, value in enumerate(row):
                text = "" if value != value else format(value, form)
                axes.text(x, y, text, ha="center", va="center", fontsize=9)
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("memory of")
        axes.set_ylabel("accessed by")
        axes.set_title(title)
        figure.colorbar(image, ax=axes, shrink=0.8)
    figure.savefig(path, dpi=150)
    print(f"drawn to {path}", file=sys.stderr)
