"""What the pages made from docstrings share: sections as Markdown, and the command."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

_LISTS = ("Args:", "Raises:", "Returns:")


def markdown(body: str) -> list[str]:
    """A docstring's sections in Markdown: arguments and errors as lists, layouts as they are.

    A layout is what stands indented after a line that ends in "::", after "Attributes:", or after
    an empty line outside of a list.
    """
    lines: list[str] = []
    inside = ""  # the section that indented lines belong to
    for line in body.replace(":func:`", "`").splitlines():
        indented = line.startswith("    ")
        if inside == "layout" and line and not indented:
            lines[-1:] = ["```", ""] if not lines[-1] else [lines[-1], "```", ""]
            inside = ""
        if inside == "" and indented and lines and not lines[-1]:
            lines.append("```")
            inside = "layout"
        if line.endswith("::") and not indented:
            lines += [line[:-1], "", "```"]
            inside = "opening"
        elif re.fullmatch("Attributes.*:", line):
            lines += [f"**{line[:-1]}**", "", "```"]
            inside = "layout"
        elif inside == "opening":  # the blank line before a layout
            inside = "layout"
        elif line in _LISTS:
            lines += [""] if lines and lines[-1] else []
            lines += [f"**{line[:-1]}**", ""]
            inside = "list"
        elif inside == "list" and indented and not line.startswith("     "):
            name, colon, rest = line.strip().partition(": ")
            lines.append(f"- `{name}`: {rest}" if colon else f"- {name}")
        elif inside == "list" and indented:
            lines.append("  " + line.strip())
        else:
            if inside == "list" and line:
                lines += [""] if lines[-1] else []
                inside = ""
            lines.append(line[4:] if inside == "layout" and indented else line)
    if inside == "layout":
        lines.append("```")
    return lines


def main(target: Path, document: Callable[[], str]) -> int:
    """Writes the page; with --check only compares it, and the exit status says whether it is so."""
    text = document()
    if "--check" not in sys.argv[1:]:
        target.write_text(text)
    elif target.read_text() != text:
        print(f"docs/{target.name} is not what scripts/{Path(sys.argv[0]).name} writes")
        return 1
    return 0
