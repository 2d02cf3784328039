"""What all benchmarks share: their options, and a run from the first row to the last file."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ...errors import CommunicatorError
from . import record, report
from .record import Record, Row

_DTYPES = ("float32", "float16", "bfloat16")
#: The rows of a case, for its options; what it learns of the machine goes into the dictionary.
Rows = Callable[[argparse.Namespace, dict[str, Any]], Iterator[Row]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the figures go, for every case."""
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="write every figure there")
    add("--markdown", type=Path, metavar="FILE", help="write the table there")
    add("--plot", type=Path, metavar="FILE", help="draw figures over bytes (needs matplotlib)")
    add("--compare", type=Path, metavar="FILE", help="print new / old of what --json wrote before")
    add("--tolerance", type=float, default=0.1, help="exit 1 where ours is worse by more (0.1)")
    add("--commit", default="", help="stated with the figures; default: git's HEAD")


def add_ranks(parser: argparse.ArgumentParser, default: Sequence[int], what: str = "ranks") -> None:
    text = ", ".join(map(str, default)) or "all GPUs"
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=list(default), help=f"{what} (default: {text})"
    )


def add_collectives(parser: argparse.ArgumentParser, dtypes: Sequence[str] | None = None) -> None:
    """For a collective, whose ranks are started and have an end."""
    add = parser.add_argument
    text = " ".join(dtypes) if dtypes else "bfloat16 on GPUs, float32 on CPUs"
    add("--sizes", type=_size, nargs="+", metavar="BYTES", help="of one rank, with K, M or G")
    add("--dtypes", nargs="+", choices=_DTYPES, default=dtypes, help=f"default: {text}")
    add("--timeout", type=float, default=3600.0, help="seconds that the ranks may take")


def _size(text: str) -> int:
    try:
        nbytes = report.parse_size(text)
    except ValueError:
        nbytes = 0
    if nbytes <= 0:
        raise argparse.ArgumentTypeError(f"a size is a number of bytes, as 64K or 4M; got {text!r}")
    return nbytes


def drive(
    case: str,
    about: str,
    ours: Sequence[str],
    rows: Rows,
    options: argparse.Namespace,
    command: str,
    summarize: Callable[[Record], str] = lambda _: "",
    keep: Path | None = None,
) -> int:
    """Measures, prints, writes and compares; the exit status. An error of ours is one sentence.

    Args:
        about: the title and the text of what `--markdown` writes.
        summarize: what is said below the table.
        keep: the folder that holds a folder of results a commit.
    """
    try:
        if options.plot:
            report.figure_module()  # before anything is measured
        old = record.read(options.compare) if options.compare else None
        begun = record.start(case, ours, command, options.commit)
        facts: dict[str, Any] = {}
        found: list[Row] = []
        with ExitStack() as stack:
            made = rows(options, facts)
            stack.callback(getattr(made, "close", lambda: None))
            for row in made:
                found.append(row)
                print(report.line(row, begun.ours), flush=True)
        done = dataclasses.replace(begun, rows=tuple(found), machine={**begun.machine, **facts})
        return _conclude(done, about, summarize(done), options, keep, old)
    except CommunicatorError as error:
        print(f"bench {case}: {error}", file=sys.stderr)
        return 1


def _conclude(
    done: Record,
    about: str,
    summary: str,
    options: argparse.Namespace,
    keep: Path | None,
    old: Record | None,
) -> int:
    print(
        "",
        report.headline(done),
        "",
        *report.table(done),
        *([summary] if summary else []),
        sep="\n",
    )
    kept = [keep / done.commit / f"{done.case}.json"] if keep else []
    for path in [*kept, *([options.json] if options.json else [])]:
        done.write(path)
    if options.plot:
        report.plot(done, options.plot)
    if options.markdown:
        options.markdown.write_text(report.markdown(done, about, summary, options.plot))
    return 0 if old is None else compared(old, done, options.tolerance)


def compared(old: Record, new: Record, tolerance: float) -> int:
    """Prints new / old a figure; 1 when one of ours is worse by more than the tolerance."""
    lines, held = record.compare(old, new, tolerance)
    print(f"\n{new.case}, {old.commit} and {new.commit}; ratios are new / old")
    differs = [
        k for k in old.machine if k != "load_average" and old.machine[k] != new.machine.get(k)
    ]
    if differs:
        print(f"the machines differ in {', '.join(differs)}")
    print(*_aligned(lines), sep="\n")
    print(f"ours {'held' if held else 'got worse by more than'} a tolerance of {tolerance:.0%}")
    return 0 if held else 1


def _aligned(lines: Iterable[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(t.ljust(w) for t, w in zip(one, widths, strict=True)).rstrip() for one in lines
    ]
