"""Compiles the collectives' kernels for gfx942 (MI300) and looks at what they became.

No AMD GPU has run them. This is what can be said without one: they compile, without calls and
without scratch memory, and their releases and acquires are there.

    python scripts/check_rocm.py               all kernels; exit status 77 when packages are missing
    python scripts/check_rocm.py quick_all_reduce
    python scripts/check_rocm.py --has compiler            exit status 0 if so; or headers

scripts/setup_rocm brings what it needs.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROCM = ROOT / "build/rocm"  # scripts/setup_rocm's
ARCH = "gfx942"
MISSING = 77  # the exit status by which test drivers know a skip

#: Kernel files: for each kernel, by a part of its name, how many instructions of system scope it
#: has at least, as the source has them: barriers before which every thread releases its own stores,
#: releasing stores, acquiring loads. In kernels that use Lamport vectors data is in place of them.
KERNELS = {
    "quick_all_reduce": {"quick_all_reduce_kernel": (0, 0, 0)},
    "all_reduce_one_shot": {"one_shot_kernel": (0, 0, 0), "one_shot_rounds_kernel": (0, 0, 0)},
    "all_reduce_two_shot": {"two_shot_kernel": (0, 0, 0)},
    "all_reduce_streamed": {"streamed_kernel": (1, 2, 4)},
    "all_gather": {"small_kernel": (0, 0, 0), "bulk_kernel": (1, 1, 1)},
    "meet": {"meet_kernel": (0, 0, 0)},
}

# The reports of late peers have fences of their own, which neither loads nor stores follow at once.
_WAITS = r"(?:\s+s_waitcnt.*\n)*"
ORDERS = (
    (
        "releases before a barrier",
        rf"buffer_wbl2 sc0 sc1\n{_WAITS}\s+buffer_inv sc0 sc1\n\s+s_barrier",
    ),
    ("releasing stores", rf"buffer_wbl2 sc0 sc1\n{_WAITS}\s+(?:flat|global)_store\S+ .*sc0 sc1"),
    ("acquiring loads", rf"(?:flat|global)_load\S+ .*sc0 sc1\n{_WAITS}\s+buffer_inv sc0 sc1"),
)


def headers() -> Path | None:
    """The directory with hip/hip_runtime.h, of a triton package."""
    places = [ROCM / "triton"]
    found = importlib.util.find_spec("triton")
    if found is not None and found.origin is not None:
        places.append(Path(found.origin).parent)
    for place in places:
        include = place / "backends/amd/include"
        if (include / "hip/hip_runtime.h").exists():
            return include
    return None


def compiler() -> tuple[Path, dict[str, str]] | None:
    """clang++ 19 and the environment that it runs in, from the system or from build/rocm."""
    installed = shutil.which("clang++-19")
    if installed is not None:
        return Path(installed), dict(os.environ)
    unpacked = ROCM / "root/usr/lib/llvm-19/bin/clang++"
    if not unpacked.exists():
        return None
    libraries = [ROCM / "root/usr/lib/llvm-19/lib", *ROCM.glob("root/usr/lib/*-linux-gnu")]
    path = ":".join(str(library) for library in libraries)
    return unpacked, dict(os.environ, LD_LIBRARY_PATH=path)


def bitcode() -> Path | None:
    """The directory of AMD's device libraries."""
    for root in (Path("/"), ROCM / "root"):
        for found in root.glob("usr/lib/*-linux-gnu/amdgcn/bitcode"):
            if (found / "ocml.bc").exists():
                return found
    return None


def has_compiler() -> bool:
    found = compiler()
    return found is not None and bitcode() is not None and _runs(*found)


def _runs(clang: Path, environment: dict[str, str]) -> bool:
    done = subprocess.run([clang, "--version"], env=environment, capture_output=True, timeout=60)
    return done.returncode == 0


def missing() -> list[str]:
    """What is not there, in words."""
    lacking = []
    if not has_compiler():
        lacking.append("clang++-19 and AMD's device libraries")
    if headers() is None:
        lacking.append("HIP's headers")
    return lacking


def toolchain(directory: Path) -> list[str]:
    """Lays out what clang takes for a ROCm installation; its options."""
    include, libraries = headers(), bitcode()
    assert include is not None and libraries is not None
    (directory / "share/hip").mkdir(parents=True)
    (directory / "bitcode").mkdir()
    (directory / "include").symlink_to(include)
    version = "HIP_VERSION_MAJOR=7\nHIP_VERSION_MINOR=1\nHIP_VERSION_PATCH=0\n"
    (directory / "share/hip/version").write_text(version)
    for library in libraries.glob("*.bc"):
        (directory / "bitcode" / library.name).symlink_to(library)
    # Older than gfx942, whose instructions it does not choose: it holds one constant.
    number = directory / "bitcode/oclc_isa_version_942.bc"
    if not number.exists():
        number.symlink_to(libraries / "oclc_isa_version_940.bc")
    return [f"--rocm-path={directory}", f"--rocm-device-lib-path={directory}/bitcode"]


def assembly(name: str, options: list[str], directory: Path) -> str:
    """The kernels of native/collectives/<name>.cu, as text."""
    out = directory / f"{name}.s"
    found = compiler()
    assert found is not None
    clang, environment = found
    command = [
        str(clang), "-x", "hip", f"--offload-arch={ARCH}", "--cuda-device-only",
        "--no-gpu-bundle-output", "-O3", "-std=c++20", "-Werror", f"-I{ROOT / 'native'}", *options,
        "-S", "-o", str(out), str(ROOT / f"native/collectives/{name}.cu"),
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=600, env=environment)
    return out.read_text()


def faults(name: str, text: str) -> list[str]:
    """What is wrong with the kernels of one file."""
    expected = KERNELS[name]
    kernels = re.findall(r"^\s*\.amdhsa_kernel (\S+)$", text, re.MULTILINE)
    found = [
        f"{name}: no {part} came out"
        for part in expected
        if not any(part in kernel for kernel in kernels)
    ]
    for kernel in kernels:
        begin = text.index(f"\n{kernel}:")
        body = text[begin : text.index(".amdhsa_kernel", begin)]
        body = re.sub(r"[ \t]*;.*", "", body)
        statistics = text[begin : text.find("\n\t.protected", begin + 1)]
        scratch = re.search(r"; ScratchSize: (\d+)", statistics)
        if scratch is None or int(scratch[1]) > 0:
            found.append(f"{kernel}: it uses scratch memory, {scratch and scratch[1]} bytes a lane")
        if re.search(r"\bs_swappc_b64\b|\bs_setpc_b64\b", body):
            found.append(f"{kernel}: it calls functions")
        least = next((counts for part, counts in expected.items() if part in kernel), None)
        if least is None:
            found.append(f"{kernel}: it is not listed in KERNELS")
            continue
        for (what, pattern), number in zip(ORDERS, least, strict=True):
            count = len(re.findall(pattern, body))
            if count < number:
                found.append(f"{kernel}: {count} {what}, at least {number} expected")
    return found


def main(names: list[str]) -> int:
    if names[:1] == ["--has"]:
        return 0 if {"compiler": has_compiler, "headers": headers}[names[1]]() else 1
    lacking = missing()
    if lacking:
        print(f"check_rocm: missing: {'; '.join(lacking)}; scripts/setup_rocm brings them")
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
