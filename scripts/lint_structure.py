"""The structural rules of docs/design.md that a program can check. Prints each breach; exit 1."""

from __future__ import annotations

import fnmatch
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

TOP_LEVEL = {
    "pyproject.toml", "communicators", "native", "kvcache_ops", "tests", "scripts",
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "docs", ".ci",
    ".gitignore", ".clang-format", ".pre-commit-config.yaml",
}  # fmt: skip
MAX_MODULES = 8  # at the top of communicators/, beside __init__
MAX_LINES = 400
MAX_COLUMNS = 100  # of prose in Markdown pages; ruff and clang-format see to the sources
#: Files above that, with their own bound. References and case generators are lists of small things;
#: the others are to be split, and none may grow.
LARGER = {
    "communicators/backends/custom_all_reduce.py": 450,
    "communicators/message_queue/queue.py": 460,
    "native/attention/paged_attention.cuh": 560,
}

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
        re.compile(
            r"\b(_mm\d*_\w+|__m(64|128|256|512)\w*|__builtin_ia32_\w+|_tile_\w+|v\w+q?_[fsup]\d+"
            r"|sv\w+_[fsu]\d+\w*)\b|#\s*include\s*<(\w*mmintrin|immintrin|arm_\w+)\.h>"
        ),
        lambda path: path.parts[0] == "native" and path.parts[1] != "prim",
        "SIMD intrinsics stand in native/prim alone",
    ),
    (
        re.compile(
            r"\b__(shfl|ballot|any|all|match_any|match_all|reduce_\w+|activemask|syncwarp|vote\w*)"
            r"(_sync|_up\w*|_down\w*|_xor\w*)?\s*\(|\b__(dp[24]a|nanosleep|ldg|ldcs|stcs|ldcg|stcg)\w*"
        ),
        lambda path: path.parts[0] == "native" and path.parts[1] != "prim",
        "intrinsics of warps and of the memory stand in native/prim alone",
    ),
    (
        re.compile(r"#\s*include\s*[<\"](ATen|c10|aten|caffe2)/(?!dlpack\.h)"),
        lambda path: path.parts[0] == "native",
        "headers of ATen and c10 are no stable interface (DLPack's alone is)",
    ),
    (
        re.compile(r"#\s*include\s*[<\"]torch/"),
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

#: What counts as a name of a file: in sources a full path; in Markdown also any path into a
#: top-level folder, a link, and the end of a path (`prim/gpu.h`).
_FOLDERS = r"(?:communicators|native|kvcache_ops|tests|scripts|docs)/"
_KINDS = r"\.(?:py|pyi|h|cpp|cu|cuh|inc|md)"
_FILE = re.compile(rf"(?<![\w./*-]){_FOLDERS}[\w/*.-]*{_KINDS}\b")
_MENTION = re.compile(rf"(?<![\w./*-])(?:{_FOLDERS}[\w/*.-]*[\w*]|[a-z][\w/*-]*{_KINDS}\b)")
_LINK = re.compile(r"\]\((?!\w+:)([^)#]+)")
#: Names in pages that are not ours: torch's header, nccl-tests' page, what a user writes.
_FOREIGN = {"torch/csrc/inductor/aoti_torch/c/shim.h", "doc/PERFORMANCE.md",
            "driver_types.h", "first.py", "nccl.h", "table.md"}  # fmt: skip


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


def unwrapped(path: Path) -> list[str]:
    """The lines of a Markdown page that are too long: all but tables, code and single words."""
    found = []
    code = False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = line.strip()
        code ^= text.startswith("```")
        if len(line) > MAX_COLUMNS and not code and not text.startswith("|") and " " in text:
            found.append(f"{path}:{number}: {len(line)} columns; prose is wrapped at {MAX_COLUMNS}")
    return found


@functools.lru_cache
def _known(name: str, files: frozenset[str]) -> bool:
    if name in _FOREIGN or name.endswith(".so"):  # libraries are built, and in no list
        return True
    ends = (name, f"{name}/*", f"*/{name}")
    return any(fnmatch.fnmatch(file, end) for end in ends for file in files)


def missing(path: Path, files: frozenset[str]) -> Iterator[str]:
    """Names of files in the file at `path` that are none of `files`, each with its line."""
    page = path.suffix == ".md"
    for number, line in enumerate(path.read_text().splitlines(), 1):
        names = (_MENTION if page else _FILE).findall(line)
        wrong = [name for name in names if not _known(name.rstrip("/."), files)]
        if page:
            wrong += [link for link in _LINK.findall(line) if not (path.parent / link).exists()]
        for name in wrong:
            yield f"{path}:{number}: no file of this repository: {name}"


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
    modules = [path.stem for path in map(Path, listed) if path.parent == Path("communicators")
               and path.suffix == ".py" and path.stem != "__init__" and path.exists()]  # fmt: skip
    if len(modules) > MAX_MODULES:
        found.append(f"communicators: {len(modules)} modules; over {MAX_MODULES} make a folder")
    sources = {".py", ".pyi", ".cpp", ".cu", ".cuh", ".h", ".inc"}
    present = [path for path in map(Path, listed) if path.exists()]
    files = frozenset(map(str, present))
    for path in present:
        if path.suffix in sources and len(path.parts) > 1:
            found += breaches(path)
            found += missing(path, files)
        if path.suffix == ".md":
            found += unwrapped(path)
            found += missing(path, files)
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
