"""The ring's C++ under ThreadSanitizer, and under AddressSanitizer with UBSan: ring_stress.cpp."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RING = [
    ROOT / f"native/shm/{name}.cpp"
    for name in ("arena", "cpus", "ring", "ring_reader", "ring_writer")
]
SOURCES = [ROOT / "tests/unit/ring_stress.cpp", *RING]
FLAGS = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]
WRAP = 2**31 - 500  # counters are kept doubled in 32 bits


def compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


@pytest.fixture(scope="module", params=["none", "thread", "address,undefined"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    compile_with = compiler()
    if compile_with is None:
        pytest.skip("there is no C++ compiler")
    directory = tmp_path_factory.mktemp("ring_stress")
    flags = [] if request.param == "none" else [f"-fsanitize={request.param}"]
    empty = directory / "empty.cpp"
    empty.write_text("int main() { return 0; }\n")
    probe = [compile_with, *flags, str(empty), "-o", str(directory / "probe")]
    if subprocess.run(probe, capture_output=True, check=False, timeout=120).returncode != 0:
        pytest.skip(f"this compiler has no runtime for -fsanitize={request.param}")
    if subprocess.run([directory / "probe"], check=False, timeout=60).returncode != 0:
        pytest.skip(f"programs with -fsanitize={request.param} do not run on this kernel")
    output = directory / "ring_stress"
    command = [compile_with, *FLAGS, *flags, f"-I{ROOT / 'native'}", *map(str, SOURCES)]
    done = subprocess.run(
        [*command, "-o", str(output)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.parametrize("first", [0, WRAP], ids=["from 0", "across the wrap"])
def test_no_race_no_stray_access_nothing_lost(program: Path, first: int) -> None:
    done = subprocess.run(
        [program, "30000", str(first)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "halt_on_error=1"},
    )
    assert done.returncode == 0 and done.stdout == "all read\n", done.stdout + done.stderr
