"""Finds and loads the native libraries: `_native_cpu` always, `_native_cuda` where torch has CUDA.

Both are built on torch's stable ABI, register their operators when they are loaded
(`torch.ops.communicators`, `torch.ops.kvcache_ops`), and carry the project's version, which is
compared here: a library left over from another build would take wrong arguments silently.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import re
import sysconfig
from pathlib import Path
from types import ModuleType

import torch

from .. import __version__, errors
from ..errors import CommunicatorError, NativeLibraryError
from ..settings import Settings

_EXIT_NS = 1_000_000_000  # at most so long the exit of the process waits for its threads

_DISTRIBUTION = "device-communicators"


def library_path(name: str) -> Path:
    """The path of `_native_<name>.so`; NativeLibraryError, with the places looked at, if absent."""
    file = f"_native_{name}.so"
    if directory := Settings.from_environment().native_dir:
        chosen = Path(directory) / file
        if chosen.exists():
            return chosen
        raise NativeLibraryError(f"{chosen} was not found, and COMMUNICATORS_NATIVE_DIR is set")
    beside = Path(__file__).parents[1] / file
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


def has_cuda() -> bool:
    """Whether this torch is built for GPUs and the CUDA library was built, too. Touches no GPU."""
    if torch.version.cuda is None and torch.version.hip is None:
        return False
    try:
        library_path("cuda")
    except NativeLibraryError:
        return False
    return True


def load_ops() -> None:
    """Loads what torch.ops.communicators is made of: the CPU library, and CUDA's if it is there."""
    from ..functional.shm import load as load_cpu

    load_cpu()
    if has_cuda():
        load("cuda")


@functools.cache
def python_module(name: str) -> ModuleType | None:
    """A Python module that the CPU library holds (native/python); None where it cannot be had.

    That is where the interpreter has no lock (its free-threaded builds load no modules of the
    limited API), and where the library was compiled without Python's headers. NativeLibraryError
    when it is of another version or broken.
    """
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return None
    path = str(load("cpu"))
    if not hasattr(ctypes.PyDLL(path), f"PyInit_{name}"):
        return None
    loader = importlib.machinery.ExtensionFileLoader(name, path)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    try:
        loaded = importlib.util.module_from_spec(spec)
        loader.exec_module(loaded)
    except ImportError as error:
        raise NativeLibraryError(f"{path} holds no {name} for this Python: {error}") from error
    if loaded.version != __version__:
        raise NativeLibraryError(
            f"{path} is version {loaded.version}, and the Python package is {__version__}; "
            "install or compile it again"
        )
    return loaded


@atexit.register
def _end_calls() -> None:
    """Ends the calls of other threads when the process exits (native/shm/process.h).

    Runs when the threads that are no daemons have ended, and, since handlers run in the reverse
    order, after those of whoever imported this module.
    """
    if load.cache_info().currsize:
        ctypes.CDLL(str(load("cpu"))).communicators_end_calls(ctypes.c_int64(_EXIT_NS))


_TAGGED = re.compile(r"(\w+): (.*)", re.DOTALL)


def typed(error: RuntimeError) -> RuntimeError:
    """The exception that an error of a native operator stands for.

    Native code starts its texts with the name of a class of errors.py; an error without one is
    returned as it is. When a signal handler raised while native code waited (Ctrl-C), what it
    raised is raised here instead. A thread that is told that the process exits has been heard.
    """
    match = _TAGGED.match(str(error).rstrip())
    if match is None:
        return error
    tag, text = match.groups()
    if tag == "Interrupted":
        # PyDLL raises the Python exception that the call leaves set.
        ctypes.PyDLL(str(load("cpu"))).communicators_reraise()
        return CommunicatorError(text)
    if tag == "Exiting":
        ctypes.PyDLL(str(load("cpu"))).communicators_exit_heard()
        return CommunicatorError(text)
    kind = getattr(errors, tag, None)
    if isinstance(kind, type) and issubclass(kind, CommunicatorError):
        return kind(text)
    return error
