"""The collectives' kernels themselves, compiled for the CPU and run as threads (emulated_gpu/).

It checks results, in place too, with calls of all kinds in random order and shape, and after each
call what workspace.h promises of a workspace at rest. It shows errors of the protocol, not of the
GPU's memory model; tests/gpu runs the same on a GPU.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

_HERE = Path(__file__).parent / "emulated_gpu"
_NATIVE = Path(__file__).parents[2] / "native"
_KERNELS = ("all_reduce_one_shot", "all_reduce_streamed", "all_reduce_two_shot", "all_gather")


def _compile(source: Path, target: Path, state_words: int) -> Path:
    command = [
        "c++", "-std=c++20", "-O1", "-pthread", f"-DCOMMUNICATORS_STATE_WORDS={state_words}",
        "-DCOMMUNICATORS_BLOCK_THREADS=32",
        f"-I{_HERE}", f"-I{_NATIVE}", "-x", "c++", "-c", str(source), "-o", str(target),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module", params=(512, 2), ids=("small grids", "big grids"))
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two state words a grid of three blocks is a big one (class Call)."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    directory = tmp_path_factory.mktemp("emulated")
    objects = [
        _compile(_NATIVE / "collectives" / f"{name}.cu", directory / f"{name}.o", request.param)
        for name in _KERNELS
    ]
    objects.append(_compile(_HERE / "kernels.cpp", directory / "kernels.o", request.param))
    target = directory / "kernels"
    subprocess.run(["c++", "-pthread", *map(str, objects), "-o", str(target)], check=True)
    return target


@pytest.mark.parametrize("seed", (1, 2))
def test_calls_in_random_order(program: Path, seed: int) -> None:
    done = subprocess.run(
        [str(program), "25", str(seed)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout
