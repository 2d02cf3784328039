"""What a native library shows of itself: the symbols that Python reaches, and nothing more.

    scripts/check_symbols.py [LIBRARY ...]      default: the ones that would be loaded here

A library that exports its C++ runtime (a bundled compiler links it in) meets torch's in one
process, and the first error message crashes. Nor may it hold paths of the machine that compiled it.
Prints each breach; exit 1.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: As in native/exports.map.
EXPORTED = re.compile(r"PyInit_\w+|communicators_\w+|kvcache_limit_isa")
#: Absolute paths of two folders or more; what Linux itself has under these is the same everywhere.
PATH = re.compile(rb"(?<![\w.$/-])/(?!proc/|sys/|dev/|etc/)[\w.+@-]+/[\w.+@-]+/[\w./+@-]+")


def exported(library: Path) -> list[str]:
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", "--format=posix", library],
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.split()[0].split("@")[0] for line in listed.stdout.splitlines()]


def breaches(library: Path) -> list[str]:
    symbols = exported(library)
    found = [f"{library}: exports {s}" for s in symbols if not EXPORTED.fullmatch(s)]
    if not symbols:
        found.append(f"{library}: exports nothing, so Python reaches nothing")
    paths = sorted({match.decode() for match in PATH.findall(library.read_bytes())})
    return found + [f"{library}: holds the path {path}" for path in paths]


def libraries() -> list[Path]:
    sys.path.insert(0, str(ROOT))
    from communicators.bindings.native import library_path
    from communicators.errors import NativeLibraryError

    found = [library_path("cpu")]
    try:
        found.append(library_path("cuda"))
    except NativeLibraryError:
        print("check_symbols: no CUDA library was built")
    return found


def main() -> int:
    given = [Path(argument) for argument in sys.argv[1:]] or libraries()
    found = [line for library in given for line in breaches(library)]
    shown = 20
    print("\n".join(found[:shown]), end="\n" if found else "")
    if len(found) > shown:
        print(f"... and {len(found) - shown} more")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
