"""Find the tensors of a Hugging Face directory and read parts of them.

Format: huggingface.co/docs/safetensors. One model.safetensors, or several files and a
model.safetensors.index.json whose weight_map says which file holds which tensor. The files are
mapped, and only the pages of the slices that are asked for are read.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("BF16", "F16", "F32")


class CheckpointFiles:
    """The open files of one checkpoint; use as a context manager.

    Attributes:
        directory: where they lie.
        file_of: tensor name -> the file that holds it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file_of: dict[str, Path] = {}
        self._stack = ExitStack()
        self._files: dict[Path, Any] = {}

    def __enter__(self) -> CheckpointFiles:
        """Raises CheckpointError for a directory without weights, or a truncated file."""
        if not self.directory.is_dir():
            raise CheckpointError(f"{self.directory}: not a directory")
        single, index = self.directory / SINGLE, self.directory / INDEX
        if index.is_file():
            self.file_of = _read_index(index)
        elif single.is_file():
            self.file_of = {name: single for name in self._open(single).keys()}  # noqa: SIM118
        else:
            raise CheckpointError(f"{self.directory}: holds neither {SINGLE} nor {INDEX}")
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()
        self._stack.close()

    def problems(self, shapes: dict[str, tuple[int, ...]]) -> list[str]:
        """One sentence for each tensor of ``shapes`` that is missing or is not as it says.

        Reads the headers of the files, not the tensors.
        """
        found: list[str] = []
        broken: set[Path] = set()
        for name, shape in shapes.items():
            path = self.file_of.get(name)
            if path is None:
                found.append(f"{self.directory}: tensor {name} is missing")
            elif path not in broken:
                try:
                    found += self._header_problems(name, path, shape)
                except CheckpointError as error:
                    broken.add(path)
                    found.append(str(error))
        return found

    def _header_problems(self, name: str, path: Path, shape: tuple[int, ...]) -> list[str]:
        file = self._open(path)
        try:
            stored = file.get_slice(name)
        except SafetensorError:
            return [f"{path}: tensor {name} is missing; the index says that it is in this file"]
        problems = []
        if tuple(stored.get_shape()) != shape:
            problems.append(
                f"{path}: tensor {name} must have shape {list(shape)} by config.json; it has "
                f"{list(stored.get_shape())}"
            )
        if stored.get_dtype() not in FLOATS:
            problems.append(
                f"{path}: tensor {name} has dtype {stored.get_dtype()}; accepted: "
                f"{', '.join(FLOATS)}"
            )
        return problems

    def read(self, name: str, rows: slice, columns: slice | None = None) -> Tensor:
        """The slice ``[rows]`` or ``[rows, columns]`` of a tensor, on the CPU, as stored."""
        stored = self._open(self.file_of[name]).get_slice(name)
        return stored[rows] if columns is None else stored[rows, columns]

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(explain_broken(path, error)) from error
            self._files[path] = file
        return self._files[path]


def _read_index(path: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        for file in weight_map.values():
            if not file or Path(file).name != file:
                raise ValueError(f"{file!r} is not the name of a file beside it")
        return {name: path.parent / file for name, file in weight_map.items()}
    except (ValueError, KeyError, AttributeError, TypeError, OSError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: an object with a weight_map of tensor names to files is expected; {error!r}"
        ) from error


def explain_broken(path: Path, error: Exception) -> str:
    """Why a file cannot be opened; for a truncated one, the first tensor that is cut off."""
    if not path.is_file():
        return f"{path}: the file is missing"
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        header_bytes = file.read(header_size) if 0 < header_size <= size else b""
    if size < 8 or len(header_bytes) < header_size:
        return f"{path}: truncated inside its header; {size} bytes are there"
    try:
        tensors = {k: v for k, v in json.loads(header_bytes).items() if k != "__metadata__"}
        ends = sorted((entry["data_offsets"][1], name) for name, entry in tensors.items())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return f"{path}: not a safetensors file; {error}"
    cut = [name for end, name in ends if 8 + header_size + end > size]
    if not cut:
        return f"{path}: not a usable safetensors file; {error}"
    expected = 8 + header_size + ends[-1][0]
    return (
        f"{path}: truncated: {size} bytes of {expected} are there; tensor {cut[0]} is the first "
        f"of {len(cut)} that are cut off"
    )


def as_dtype(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous copy of its own, so that no page of the file stays mapped for it."""
    return torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor)
