"""The native ends of MessageQueue and the plain codec, compiled with AddressSanitizer and UBSan."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.unit.test_queue_extension import SEND_AND_RECEIVE
from tests.unit.test_ring_sanitizers import FLAGS, RING, ROOT, compiler

MODULE = set((ROOT / "native/python").glob("*.cpp")) - {ROOT / "native/python/all_reduce_call.cpp"}
SOURCES = [*RING, ROOT / "native/shm/ring_api.cpp", *sorted(MODULE)]
DEFINES = [
    "-DPy_LIMITED_API=0x030A0000",
    "-DPY_SSIZE_T_CLEAN",
    '-DCOMMUNICATORS_VERSION="0"',
    "-fPIC",
    "-shared",
    "-fsanitize=address,undefined",
]

DAMAGE = """
import importlib.machinery, importlib.util, random, sys
loader = importlib.machinery.ExtensionFileLoader("_native_queue", sys.argv[1])
spec = importlib.util.spec_from_file_location("_native_queue", sys.argv[1], loader=loader)
module = importlib.util.module_from_spec(spec)
loader.exec_module(module)
rng = random.Random(7)

def thing(depth):
    kind = rng.randrange(12 if depth < 5 else 8)
    if kind < 8:
        return (None, True, rng.randrange(300) - 150, rng.getrandbits(62), rng.random(),
                "key", "u" * rng.randrange(300), bytes(rng.randrange(40)))[kind]
    size = rng.randrange(6)
    if kind == 11:
        return {f"{'n' * rng.randrange(40)}{i}": thing(depth + 1) for i in range(size)}
    return [list, tuple, list][kind - 8](thing(depth + 1) for _ in range(size))

decoded = refused = 0
for _ in range(4000):
    obj = thing(0)
    message = module.encode(obj, 1 << 14)
    if message is None:
        continue
    assert module.decode(message) == obj
    module.encode(obj, rng.randrange(len(message)))
    for _ in range(8):
        bad = bytearray(message[: rng.randrange(len(message) + 1)])
        for _ in range(rng.randrange(3)):
            if bad:
                bad[rng.randrange(len(bad))] = rng.randrange(256)
        try:
            module.decode(bytes(bad))
            decoded += 1
        except (ValueError, TypeError):
            refused += 1
assert decoded > 1000 and refused > 1000, (decoded, refused)
print("fine")
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compile_with = compiler()
    include = Path(sysconfig.get_paths()["include"])
    if compile_with is None or not (include / "Python.h").exists():
        pytest.skip("there is no C++ compiler, or no Python.h")
    output = tmp_path_factory.mktemp("queue") / "ends.so"
    command = [compile_with, *FLAGS, *DEFINES, f"-I{ROOT / 'native'}", "-isystem", str(include)]
    done = subprocess.run(
        [*command, *map(str, SOURCES), "-o", str(output)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if "cannot find" in done.stderr:
        pytest.skip("this compiler has no runtime for -fsanitize=address,undefined")
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.parametrize("program", [SEND_AND_RECEIVE, DAMAGE], ids=["messages", "damage"])
def test_no_stray_access(library: Path, program: str) -> None:
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run(
            [compiler() or "c++", f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        if not os.path.isabs(found):
            pytest.skip(f"this compiler has no {name}")
        runtimes.append(found)
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, str(library), "libc.so.6"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={
            **os.environ,
            "LD_PRELOAD": " ".join(runtimes),
            "PYTHONMALLOC": "malloc",  # the interpreter's own pools would hide what is freed
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "halt_on_error=1",
        },
    )
    assert done.returncode == 0 and done.stdout.startswith("fine"), done.stdout + done.stderr
