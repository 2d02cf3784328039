"""The stubs of native/python name what the compiled modules have, and nothing else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from communicators.bindings import native

STUBS = Path(__file__).resolve().parents[2] / "native" / "python"


def public(names: object) -> set[str]:
    return {name for name in names if not name.startswith("_")}  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["_native_queue", "_native_all_reduce"])
def test_stub_names_what_the_module_has(name: str) -> None:
    module = native.python_module(name)
    if module is None:
        pytest.skip("this interpreter or build has no native modules")
    body = ast.parse((STUBS / f"{name}.pyi").read_text()).body
    classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
    functions = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    stated = functions | public(classes) | {"version"}
    assert stated == public(dir(module))

    def members(node: ast.ClassDef) -> set[str]:
        own = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
        return own.union(*(members(classes[base.id]) for base in node.bases))  # type: ignore[attr-defined]

    for kind in public(classes):
        assert public(members(classes[kind])) == public(dir(getattr(module, kind))), kind
