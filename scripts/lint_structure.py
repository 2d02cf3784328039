"""The structural rules of docs/design.md that a program can check. Prints each breach; exit 1."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

TOP_LEVEL = {
    "pyproject.toml", "communicators", "native", "kvcache_ops", "tests", "scripts",
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "docs", ".ci",
    ".gitignore", ".clang-format",
}  # fmt: skip
MAX_LINES = 400
#: Files above that, with their own bound. References and case generators are lists of small things;
#: the others are to be split, and none may grow.
LARGER = {
    "communicators/backends/custom_all_reduce.py": 450,
    "communicators/message_queue/queue.py": 460,
    "native/attention/paged_attention.cuh": 560,
}

#: (pattern, where it may not stand, the rule)
FORBIDDEN = [
    (
        re.compile(r"\basm\s*(volatile)?\s*\("),
        lambda path: path.parts[0] == "native" and path.parts[1] != "prim",
        "asm stands in native/prim alone",
    ),
    (
        re.compile(
            r"#\s*(if|ifdef|ifndef|elif)\b.*(__HIP|__CUDA_ARCH__|COMMUNICATORS_HIP|USE_ROCM)"
        ),
        lambda path: path.parts[0] == "native" and path.parts[1] != "prim",
        "#if on the platform stands in native/prim alone",
    ),
    (
        re.compile(r"#\s*include\s*<torch/"),
        lambda path: path.parts[0] == "native" and path.parts[1] != "torch",
        "torch headers are included in native/torch alone",
    ),
    (
        re.compile(
            r"#\s*include\s*<torch/(?!csrc/stable/|headeronly/|csrc/inductor/aoti_torch/c/shim\.h)"
        ),
        lambda path: path.parts[0] == "native",
        "only torch's stable ABI headers are included",
    ),
    (
        re.compile(
            r"#\s*include\s*<(sstream|iostream|ostream|fstream|iomanip)>|\bSTD_TORCH_CHECK\b"
        ),
        lambda path: path.parts[0] == "native",
        "native code uses no streams (prim/text.h makes sentences, torch/errors.h raises them)",
    ),
    (
        re.compile(r"\bTORCH_BOX\b"),
        lambda path: path.parts[0] == "native" and path.name != "errors.h",
        "operators are registered as torch_glue::boxed<&op> (torch/errors.h)",
    ),
    (
        re.compile(r"\b(std::)?(exit|abort|_exit)\s*\("),
        lambda path: path.parts[0] == "native",
        "native code never ends the process",
    ),
    (
        re.compile(r"os\.environ|os\.getenv"),
        lambda path: (
            path.parts[0] in ("communicators", "kvcache_ops")
            and path.as_posix() not in MAY_READ_ENVIRONMENT
        ),
        "the environment is read in settings.py (the launcher's variables in parallel_state.py "
        "and rendezvous.py)",
    ),
]
MAY_READ_ENVIRONMENT = {
    "communicators/settings.py",
    "communicators/parallel_state.py",  # WORLD_SIZE, RANK, LOCAL_RANK: torchrun's
    "communicators/groups/rendezvous.py",  # MASTER_ADDR, MASTER_PORT
    "communicators/cli/bench/gpu.py",  # LOCAL_RANK
    "communicators/cli/bench/launch.py",  # passes its own on to the ranks
    "communicators/cli/doctor.py",  # passes its own on to the trial ranks
    "communicators/cli/trial.py",
    "communicators/peer_access/p2p_worker.py",  # CUDA_VISIBLE_DEVICES of its processes
}


def breaches(path: Path) -> list[str]:
    """The rules that one source file breaks, each with its line."""
    lines = path.read_text().splitlines()
    found = []
    limit = LARGER.get(path.as_posix(), MAX_LINES)
    if len(lines) > limit:
        found.append(f"{path}: {len(lines)} lines; over {limit} a file holds two ideas")
    for number, line in enumerate(lines, 1):
        code = line.split("//")[0] if path.suffix != ".py" else line.split("#")[0]
        for pattern, applies, rule in FORBIDDEN:
            if applies(path) and pattern.search(code):
                found.append(f"{path}:{number}: {rule}: {line.strip()}")
    return found


def main() -> int:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    found = [
        f"{name}: the top level holds only {', '.join(sorted(TOP_LEVEL))}"
        for name in sorted({line.split("/")[0] for line in listed} - TOP_LEVEL)
    ]
    for name in listed:
        path = Path(name)
        sources = {".py", ".cpp", ".cu", ".cuh", ".h", ".inc"}
        if path.suffix in sources and path.exists() and len(path.parts) > 1:
            found += breaches(path)
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
