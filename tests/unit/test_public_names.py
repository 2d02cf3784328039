"""Every name of the library that a page shows can be imported, and the paths of before stay.

Pages: README, CHANGELOG, CONTRIBUTING and docs/. A name is what a code block imports, a dotted path
in text or code, and a heading of the generated API page.
"""

from __future__ import annotations

import ast
import importlib
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
PACKAGES = ("communicators", "kvcache_ops")

_BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_DOTTED = re.compile(r"(?<![\w./-])(?:communicators|kvcache_ops)(?:\.[A-Za-z_]\w*)+")
#: What is written like a path of ours and is none: files, operators' namespaces, placeholders.
_NO_NAMES = re.compile(
    r"\.(c|h|py|so|json|toml|md)$|^communicators\.X$|^communicators\.quick_all_reduce$"
)
#: Import paths from before the folders (CHANGELOG, "What stays"), with what they must still hold.
KEPT = {
    "communicators": "CpuCommunicator CustomAllreduce Group GroupCoordinator MessageQueue "
    "PyNcclCommunicator QuickAllReduce StatelessProcessGroup Settings load "
    "CommTimeoutError CommMismatchError PeerDiedError CommunicatorError InvalidArgumentError",
    "communicators.parallel_state": "init_distributed_environment initialize_model_parallel "
    "get_tp_group get_world_group destroy_model_parallel destroy_distributed_environment "
    "graph_capture",
    "communicators.allreduce": "init_custom_ar all_reduce dispose meta_size register_buffer",
    "communicators.shm": "SUMMED",
    "communicators.shm_broadcast": "MessageQueue Handle",
    "kvcache_ops": "load reshape_and_cache rms_norm paged_attention silu_and_mul",
}


def imported(source: str) -> Iterator[str]:
    """`module:name` for each import of ours; a block that is no whole program is read by lines."""
    try:
        trees = [ast.parse(textwrap.dedent(source))]
    except SyntaxError:
        trees = []
        for line in source.splitlines():
            try:
                trees.append(ast.parse(line.strip()))
            except SyntaxError:
                continue
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                if node.module.split(".")[0] in PACKAGES:
                    yield from (f"{node.module}:{one.name}" for one in node.names)
            elif isinstance(node, ast.Import):
                for one in node.names:
                    if one.name.split(".")[0] in PACKAGES:
                        yield f"{one.name}:*"


def dotted(text: str) -> Iterator[str]:
    for name in _DOTTED.findall(text):
        if not _NO_NAMES.search(name) and f"torch.ops.{name}" not in text:
            yield f"{name}:"


def names(page: Path) -> set[str]:
    text = page.read_text()
    found = {name for _, block in _BLOCK.findall(text) for name in imported(block)}
    return found | set(dotted(text))


def resolve(name: str) -> None:
    """Imports as much of a dotted path as is modules, and asks the rest for its attributes."""
    module, _, wanted = name.partition(":")
    parts = module.split(".")
    rest = [] if wanted in ("", "*") else [wanted]
    while True:
        try:
            found = importlib.import_module(".".join(parts))
            break
        except ModuleNotFoundError:
            rest.insert(0, parts.pop())
            if not parts:
                raise
    for attribute in rest:
        try:
            found = getattr(found, attribute)
        except AttributeError:  # a module that nobody has imported yet
            found = importlib.import_module(f"{found.__name__}.{attribute}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path) -> None:
    for name in sorted(names(page)):
        resolve(name)


def test_the_pages_name_something() -> None:
    found = set().union(*(names(page) for page in PAGES))
    assert {"communicators:parallel_state", "communicators.c10d:*", "kvcache_ops.load:"} <= found


@pytest.mark.parametrize(
    "name", ["communicators:Nothing", "communicators.nothing:", "kvcache_ops.x:"]
)
def test_a_name_that_is_gone_is_found(name: str) -> None:
    with pytest.raises((AttributeError, ImportError)):
        resolve(name)


@pytest.mark.parametrize("module", KEPT)
def test_paths_that_stay(module: str) -> None:
    for name in KEPT[module].split():
        resolve(f"{module}:{name}")


def test_the_generated_page_lists_what_is_there() -> None:
    """docs/api.md: its headings are names of `communicators`, and members of those."""
    text = (ROOT / "docs/api.md").read_text()
    found = re.findall(r"^####? ([\w.]+)(?:, a property)?$", text, re.MULTILINE)
    assert len(found) > 100
    for title in found:
        resolve(f"communicators.{title}:")
