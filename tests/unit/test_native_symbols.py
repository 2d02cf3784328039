"""scripts/check_symbols.py finds what a native library must not show; error texts hold no path."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kvcache_ops
from communicators import native

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/check_symbols.py"


def check_symbols():
    spec = importlib.util.spec_from_file_location("check_symbols", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def compiler() -> str:
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found is None or shutil.which("nm") is None:
        pytest.skip("there is no C++ compiler, or no nm")
    return found


SOURCE = """
#include <string>
extern "C" __attribute__((visibility("default"))) int communicators_one() { return 1; }
"""
PLANTED = {
    "nothing": ("", []),
    "a function of its own": ("void helper() {}", ["exports _Z6helperv"]),
    "the C++ runtime": (
        'template class __attribute__((visibility("default"))) std::basic_string<char16_t>;',
        ["exports _ZNSt7__cxx1112basic_string"],
    ),
    "a path": (
        'const char* communicators_path() { return "/home/somebody/build/native/x.cpp"; }',
        ["exports _Z18communicators_pathv", "holds the path /home/somebody/build/native/x.cpp"],
    ),
    "a path of Linux": (
        'extern "C" const char* communicators_path() { return "/sys/fs/cgroup/cpu.max"; }',
        [],
    ),
}


@pytest.mark.parametrize("what", PLANTED)
def test_what_is_planted_is_found(what: str, compiler: str, tmp_path: Path) -> None:
    code, expected = PLANTED[what]
    (tmp_path / "x.cpp").write_text(SOURCE + code)
    command = [compiler, "-std=c++20", "-shared", "-fPIC", "-o", "x.so", "x.cpp"]
    subprocess.run([*command, "-Wl,--no-undefined"], check=True, timeout=120, cwd=tmp_path)
    found = check_symbols().breaches(tmp_path / "x.so")
    assert bool(found) == bool(expected), found
    for one in expected:
        assert any(one in line for line in found), (one, found)


def test_the_library_in_use_shows_its_own_symbols_alone(compiler: str) -> None:
    assert check_symbols().breaches(native.load("cpu")) == []


def bits8() -> torch.Tensor:
    return torch.zeros(8, dtype=torch.uint8).view(torch.bits8)


X = torch.ones(4, 8)
TEXTS = {
    "a check": (
        lambda: torch.ops.kvcache_ops.rms_norm(X.clone(), X, torch.ones(3), 1e-6),
        "rms_norm(weight): shape [3] was given; [8] or [4, 8] is accepted",
    ),
    "a dtype that the stable interface does not name": (
        lambda: torch.ops.kvcache_ops.rms_norm(X.clone(), X, bits8(), 1e-6),
        "rms_norm(weight): a dtype that torch's stable interface does not name was given; "
        "float32 is accepted",
    ),
    "an unusual dtype": (
        lambda: torch.ops.kvcache_ops.rms_norm(X.clone(), X, torch.ones(8).to(torch.uint16), 1e-6),
        "rms_norm(weight): UInt16 was given; float32 is accepted",
    ),
    "a number": (
        lambda: torch.ops.communicators.quick_encode(torch.zeros(2, 32), -7, True),
        "quick_encode(x, bits, bfloat16): bits must be 8, 6 or 4, got -7",
    ),
    "a handle": (
        lambda: torch.ops.communicators.shm_barrier(1 << 40),
        f"InvalidArgumentError: CPU shared memory: {1 << 40} is not the handle of an open group",
    ),
}


@pytest.mark.parametrize("what", TEXTS)
def test_an_error_is_its_sentence(what: str) -> None:
    kvcache_ops.load()
    call, sentence = TEXTS[what]
    for _ in range(3):  # nothing is left over from the one before
        with pytest.raises(RuntimeError) as caught:
            call()
        assert str(caught.value) == sentence


OUT_OF_MEMORY = """
import resource, torch, communicators
communicators.load()
extremes, codes = torch.zeros(1 << 19, dtype=torch.int16), torch.zeros(1 << 22, dtype=torch.int32)
torch.ops.communicators.quick_decode(extremes[:1], codes[:8], 8, True)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (16 << 20),) * 2)
for _ in range(2):
    try:
        torch.ops.communicators.quick_decode(extremes, codes, 8, True)
    except RuntimeError as error:
        print("refused:", error)
"""


def test_a_failure_inside_torchs_own_headers_is_an_error_too() -> None:
    """They make their texts with streams: out of memory in torch::stable::empty."""
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused: ") == 2, done.stdout
    assert str(ROOT) not in done.stdout and "API call failed at torch/csrc" in done.stdout
