"""The build backend: scikit-build-core, plus torch as a build requirement only where none is found.

The native libraries are built on torch's stable ABI, so any torch >= 2.11 serves as the source of
the headers. An isolated build environment hides the torch that the user has, and naming torch in
`build-system.requires` would download a second one. So the torch of the surrounding environment is
used when there is one, and asked for only when there is none.
"""

from __future__ import annotations

import os
import subprocess
import sys

from scikit_build_core import build as _backend
from scikit_build_core.build import (  # noqa: F401  (hooks that need no change)
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
)

TORCH_REQUIREMENT = "torch>=2.11"


def surrounding_torch() -> str | None:
    """The torch package directory outside of the isolated build environment, or None.

    pip isolates a build through PYTHONPATH alone; the same interpreter without it (-I) sees the
    environment that pip runs in. Other front ends make a fresh venv, where only the variable
    DEVICE_COMMUNICATORS_TORCH_DIR can point at a torch.
    """
    given = os.environ.get("DEVICE_COMMUNICATORS_TORCH_DIR")
    if given:
        return given
    probe = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"
    found = subprocess.run([sys.executable, "-I", "-c", probe], capture_output=True, text=True)
    return os.path.dirname(found.stdout.strip()) or None


def _with_torch(requires: list[str]) -> list[str]:
    return requires if surrounding_torch() else [*requires, TORCH_REQUIREMENT]


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    return _with_torch(_backend.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    return _with_torch(_backend.get_requires_for_build_editable(config_settings))
