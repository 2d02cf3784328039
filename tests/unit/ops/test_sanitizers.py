"""The CPU ops under AddressSanitizer and UBSan, on a slice of the generated cases.

The library is compiled a second time, with both sanitizers, and loaded by a process that has their
runtime from its start. Tensors are then blocks of guarded memory: a byte read or written outside of
one ends the process with a report, and so does an overflow, a bad shift or a misaligned access.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or "c++"
BUILD = ROOT / "build" / f"sanitize-{Path(COMPILER).name}"
# Of AddressSanitizer and UBSan; clang's holds both.
RUNTIMES = ["libasan.so", "libubsan.so"]
if "clang" in Path(COMPILER).name:
    RUNTIMES = [f"libclang_rt.asan-{platform.machine()}.so"]
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def runtime(name: str) -> Path | None:
    """The compiler's shared library of that name."""
    command = [COMPILER, f"-print-file-name={name}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    path = Path(done.stdout.strip())
    return path if done.returncode == 0 and path.is_absolute() else None


@pytest.fixture(scope="module")
def library() -> Path:
    if shutil.which("cmake", path=PATH) is None:
        pytest.skip("there is no cmake")
    if None in map(runtime, RUNTIMES):
        pytest.skip("this compiler has no shared runtime of AddressSanitizer and UBSan")
    BUILD.mkdir(parents=True, exist_ok=True)
    ninja = ["-G", "Ninja"] if shutil.which("ninja", path=PATH) else []
    configure = [
        *("cmake", "-S", str(ROOT / "native"), "-B", str(BUILD), *ninja),
        "--log-level=WARNING",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_CXX_COMPILER={COMPILER}",
        "-DCOMMUNICATORS_CUDA=OFF",
        "-DCOMMUNICATORS_SANITIZE=address,undefined",
    ]
    with open(BUILD / "lock", "w") as lock:  # one of the test workers compiles
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ["cmake", "--build", str(BUILD), "--parallel", "2"]):
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=False,
                timeout=900,
                env={**os.environ, "PATH": PATH},
            )
            assert done.returncode == 0, done.stdout + done.stderr
    return BUILD / "_native_cpu.so"


def run(library: Path, what: str) -> subprocess.CompletedProcess[str]:
    # Python is not linked with libstdc++, whose throw AddressSanitizer must find.
    preload = map(runtime, [*RUNTIMES, "libstdc++.so.6"])
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(str(p) for p in preload if p),
        # What Python and torch keep until the process ends is no leak of the ops.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONPATH": str(ROOT),
        "COMMUNICATORS_NATIVE_DIR": str(library.parent),
        "OMP_NUM_THREADS": "2",
    }
    return subprocess.run(
        [sys.executable, "-m", "tests.unit.ops.sanitized_run", what],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env=environment,
    )


@pytest.mark.parametrize(("what", "counted"), [("cases", "26 ops"), ("refused", "refusals")])
def test_no_report(library: Path, what: str, counted: str) -> None:
    done = run(library, what)
    assert done.returncode == 0, done.stdout + done.stderr
    assert counted in done.stdout
    assert "runtime error" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("what", "report"),
    [
        ("planted-address", "heap-buffer-overflow"),
        ("planted-undefined", "signed integer overflow"),
    ],
)
def test_a_planted_bug_is_reported(library: Path, what: str, report: str) -> None:
    done = run(library, what)
    assert done.returncode != 0 and report in done.stderr, done.stdout + done.stderr
