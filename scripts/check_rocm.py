"""Compiles the collectives' kernels for gfx942 (MI300) and looks at what they became.

No AMD GPU has run them. This is what can be said without one: they compile, without calls and
without scratch memory, and their releases and acquires are there.

    python scripts/check_rocm.py               all kernels; exit status 77 when packages are missing
    python scripts/check_rocm.py quick_all_reduce

What it needs, on Debian 12 or later:
    apt-get install clang-19 lld-19 rocm-device-libs
    pip install --no-deps --target build/rocm triton  # for the HIP headers in it
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BITCODE = Path("/usr/lib/x86_64-linux-gnu/amdgcn/bitcode")
ARCH = "gfx942"
MISSING = 77  # the exit status by which test drivers know a skip

#: Kernel files: how many releases (write-backs) and acquires (invalidations) of system scope each
#: kernel has at least. Kernels that use marked vectors have data in place of both.
KERNELS = {
    "quick_all_reduce": (2, 4),
    "all_reduce_one_shot": (0, 0),
    "all_reduce_two_shot": (0, 0),
    "all_reduce_streamed": (1, 1),
    "all_gather": (0, 0),
}


def headers() -> Path | None:
    """The directory with hip/hip_runtime.h, of a triton package."""
    places = [ROOT / "build/rocm/triton"]
    found = importlib.util.find_spec("triton")
    if found is not None and found.origin is not None:
        places.append(Path(found.origin).parent)
    for place in places:
        include = place / "backends/amd/include"
        if (include / "hip/hip_runtime.h").exists():
            return include
    return None


def missing() -> list[str]:
    """What is not installed, in words."""
    lacking = []
    if shutil.which("clang++-19") is None:
        lacking.append("clang++-19 (Debian's clang-19 and lld-19)")
    if not (BITCODE / "ocml.bc").exists():
        lacking.append(f"{BITCODE}/ocml.bc (Debian's rocm-device-libs)")
    if headers() is None:
        lacking.append("HIP's headers (pip install --no-deps --target build/rocm triton)")
    return lacking


def toolchain(directory: Path) -> list[str]:
    """Lays out what clang takes for a ROCm installation; its options."""
    include = headers()
    assert include is not None
    (directory / "share/hip").mkdir(parents=True)
    (directory / "bitcode").mkdir()
    (directory / "include").symlink_to(include)
    version = "HIP_VERSION_MAJOR=7\nHIP_VERSION_MINOR=1\nHIP_VERSION_PATCH=0\n"
    (directory / "share/hip/version").write_text(version)
    for bitcode in BITCODE.glob("*.bc"):
        (directory / "bitcode" / bitcode.name).symlink_to(bitcode)
    # Older than gfx942, whose instructions it does not choose: it holds one constant.
    number = directory / "bitcode/oclc_isa_version_942.bc"
    if not number.exists():
        number.symlink_to(BITCODE / "oclc_isa_version_940.bc")
    return [f"--rocm-path={directory}", f"--rocm-device-lib-path={directory}/bitcode"]


def assembly(name: str, options: list[str], directory: Path) -> str:
    """The kernels of native/collectives/<name>.cu, as text."""
    out = directory / f"{name}.s"
    command = [
        "clang++-19", "-x", "hip", f"--offload-arch={ARCH}", "--cuda-device-only",
        "--no-gpu-bundle-output", "-O3", "-std=c++20", "-Werror", f"-I{ROOT / 'native'}", *options,
        "-S", "-o", str(out), str(ROOT / f"native/collectives/{name}.cu"),
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=600)
    return out.read_text()


def faults(name: str, text: str) -> list[str]:
    """What is wrong with the kernels of one file."""
    releases, acquires = KERNELS[name]
    found = []
    kernels = re.findall(r"^\s*\.amdhsa_kernel (\S+)$", text, re.MULTILINE)
    if not kernels:
        found.append(f"{name}: no kernel came out")
    for kernel in kernels:
        begin = text.index(f"\n{kernel}:")
        body = text[begin : text.index(".amdhsa_kernel", begin)]
        statistics = text[begin : text.find("\n\t.protected", begin + 1)]
        scratch = re.search(r"; ScratchSize: (\d+)", statistics)
        if scratch is None or int(scratch[1]) > 0:
            found.append(f"{kernel}: it uses scratch memory, {scratch and scratch[1]} bytes a lane")
        if re.search(r"\bs_swappc_b64\b|\bs_setpc_b64\b", body):
            found.append(f"{kernel}: it calls functions")
        for what, instruction, least in (
            ("releases", r"buffer_wbl2 sc0 sc1", releases),
            ("acquires", r"buffer_inv sc0 sc1", acquires),
        ):
            count = len(re.findall(instruction, body))
            if count < least:
                found.append(f"{kernel}: {count} {what} of system scope, at least {least} expected")
    return found


def main(names: list[str]) -> int:
    lacking = missing()
    if lacking:
        print("check_rocm: skipped, missing: " + "; ".join(lacking))
        return MISSING
    wrong = []
    with tempfile.TemporaryDirectory() as directory:
        options = toolchain(Path(directory) / "rocm")
        for name in names or KERNELS:
            text = assembly(name, options, Path(directory))
            found = faults(name, text)
            count = len(re.findall(r"^\s*\.amdhsa_kernel ", text, re.MULTILINE))
            print(
                f"check_rocm: {name}: {count} kernels for {ARCH}, {len(found)} faults", flush=True
            )
            wrong += found
    print("\n".join(wrong), end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
