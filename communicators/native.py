"""Finds and loads the native libraries: `_native_cpu` always, `_native_cuda` where torch has CUDA.

Both are built on torch's stable ABI, register their operators when they are loaded
(`torch.ops.communicators`, `torch.ops.kvcache_ops`), and carry the project's version, which is
compared here: a library left over from another build would take wrong arguments silently.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import re
from pathlib import Path

import torch

from . import __version__, errors
from .errors import CommunicatorError, NativeLibraryError

_DISTRIBUTION = "device-communicators"


def library_path(name: str) -> Path:
    """The path of `_native_<name>.so`; NativeLibraryError, with the places looked at, if absent."""
    file = f"_native_{name}.so"
    beside = Path(__file__).with_name(file)
    if beside.exists():
        return beside
    looked = [str(beside)]
    try:
        # An editable install leaves the sources where they are and the libraries in site-packages.
        installed = Path(
            str(importlib.metadata.distribution(_DISTRIBUTION).locate_file(f"communicators/{file}"))
        )
        if installed.exists():
            return installed
        looked.append(str(installed))
    except importlib.metadata.PackageNotFoundError:
        looked.append(f"the distribution {_DISTRIBUTION}, which is not installed")
    raise NativeLibraryError(
        f"{file} was not found; looked at {' and at '.join(looked)}. "
        "Install the package (pip install .) or compile it in place (scripts/build)"
    )


def _load(path: Path) -> None:
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        cause = error.__cause__ or error
        raise NativeLibraryError(
            f"{path} cannot be loaded by torch {torch.__version__}: {cause}"
        ) from error


@functools.cache
def load(name: str) -> Path:
    """Loads the library `name` ("cpu" or "cuda") once and returns its path.

    Raises NativeLibraryError when it is missing, of another version, or cannot be loaded.
    """
    if name == "cpu":
        path = library_path("cpu")
        _load(path)
        version = torch.ops.communicators.native_version()
        if version != __version__:
            raise NativeLibraryError(
                f"{path} is version {version}, and the Python package is {__version__}; "
                "install or compile it again"
            )
        return path
    if name == "cuda":
        load("cpu")  # defines the namespaces that the CUDA library adds to
        if torch.version.cuda is None and torch.version.hip is None:
            raise NativeLibraryError(
                f"the CUDA library needs a torch with CUDA, and torch {torch.__version__} is a "
                "CPU build"
            )
        path = library_path("cuda")
        _load(path)
        return path
    raise ValueError(f"no native library is named {name!r}; there are 'cpu' and 'cuda'")


_TAGGED = re.compile(r"(\w+): (.*)", re.DOTALL)


def typed(error: RuntimeError) -> RuntimeError:
    """The exception that an error of a native operator stands for.

    Native code starts its texts with the name of a class of errors.py; an error without one is
    returned as it is. When a signal handler raised while native code waited (Ctrl-C), what it
    raised is raised here instead.
    """
    match = _TAGGED.match(str(error).rstrip())
    if match is None:
        return error
    tag, text = match.groups()
    if tag == "Interrupted":
        # PyDLL raises the Python exception that the call leaves set.
        ctypes.PyDLL(str(load("cpu"))).communicators_reraise()
        return CommunicatorError(text)
    kind = getattr(errors, tag, None)
    if isinstance(kind, type) and issubclass(kind, CommunicatorError):
        return kind(text)
    return error
