"""A shared library called through ctypes: a table of functions, some of which it may lack."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import NativeLibraryError

_MAPS = Path("/proc/self/maps")


def find_loaded_library(lib_name: str) -> str | None:
    """The path of a shared library that this process has already mapped, or None.

    Read from /proc/self/maps (format: proc_pid_maps(5)). Stub libraries, made for linking only,
    are skipped; of a file that was replaced since it was mapped, the name is returned without the
    kernel's " (deleted)", and dlopen finds the mapped one by it.

    Args:
        lib_name: how the file's name begins, e.g. "libcudart"; what follows must be a version or
            a hash before ".so", as in libcudart.so.13 or libcudart-d0da41ae.so.11.0.
    """
    for line in _MAPS.read_text().splitlines():
        columns = line.split(maxsplit=5)
        if len(columns) < 6 or not columns[5].startswith("/"):
            continue
        path = columns[5].removesuffix(" (deleted)")
        rest = Path(path).name.removeprefix(lib_name)
        if rest == Path(path).name or "stubs" in path:
            continue
        if rest.startswith(".so") or (rest.startswith("-") and ".so" in rest):
            return path
    return None


class SharedLibrary:
    """Functions of a shared library, looked up once.

    A function that this version of the library lacks is an absent feature: `has` says so, and only
    calling it raises NativeLibraryError.

    Args:
        path: path or soname of the library.
        functions: name -> argument types.
        rename: maps a function's name in the table to its name in the library.

    Raises NativeLibraryError when the library cannot be loaded.
    """

    def __init__(
        self,
        path: str,
        functions: Mapping[str, Sequence[Any]],
        rename: Callable[[str], str] = str,
    ) -> None:
        self.path = path
        try:
            self._library = ctypes.CDLL(path)
        except OSError as error:
            raise NativeLibraryError(f"{path} cannot be loaded: {error}") from error
        self._functions: dict[str, Any] = {}
        for name, arguments in functions.items():
            function = getattr(self._library, rename(name), None)
            if function is not None:
                function.restype = ctypes.c_int
                function.argtypes = list(arguments)
                self._functions[name] = function

    def has(self, name: str) -> bool:
        """Whether the library holds this function."""
        return name in self._functions

    def __getitem__(self, name: str) -> Any:
        try:
            return self._functions[name]
        except KeyError:
            raise NativeLibraryError(f"{self.path} has no function {name}") from None
