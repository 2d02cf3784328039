"""The kernels compile for gfx942. Skipped where its compiler is not there (scripts/setup_rocm
brings it), unless COMMUNICATORS_REQUIRE_ROCM is set, as it is in CI."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/check_rocm.py"


def check_rocm():
    spec = importlib.util.spec_from_file_location("check_rocm", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kernel", list(check_rocm().KERNELS))
def test_kernels_compile_for_gfx942(kernel):
    done = subprocess.run(
        [sys.executable, SCRIPT, kernel], capture_output=True, text=True, timeout=900
    )
    required = os.environ.get("COMMUNICATORS_REQUIRE_ROCM", "") not in ("", "0")
    if done.returncode == check_rocm().MISSING and not required:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr


GOOD = """
add_kernel:
	buffer_wbl2 sc0 sc1  ; a fence of every thread
	s_waitcnt vmcnt(0) lgkmcnt(0)
	buffer_inv sc0 sc1
	s_barrier
	buffer_wbl2 sc0 sc1
	s_waitcnt vmcnt(0)
	global_store_dwordx2 v2, v[0:1], s[2:3] sc0 sc1
	flat_load_dwordx2 v[2:3], v[4:5] sc0 sc1
	s_waitcnt vmcnt(0)
	buffer_inv sc0 sc1
	s_endpgm
	.section	.rodata
	.amdhsa_kernel add_kernel
; ScratchSize: 0
	.protected	other_kernel
"""


def test_faults_are_found(monkeypatch):
    script = check_rocm()
    monkeypatch.setitem(script.KERNELS, "file", {"add_kernel": (1, 1, 1)})
    assert script.faults("file", GOOD) == []
    for change, *faults in (
        (("; ScratchSize: 0", "; ScratchSize: 16"), "uses scratch memory, 16 bytes"),
        (("	s_barrier\n", ""), "0 releases before a barrier, at least 1 expected"),
        (("	global_store", "	s_nop 0\n	global_store"), "0 releasing stores"),
        (("v[4:5] sc0 sc1", "v[4:5]"), "0 acquiring loads"),
        (
            ("buffer_inv sc0 sc1", "s_nop 0"),
            "0 releases before a barrier",
            "0 acquiring loads",
        ),
        (("s_endpgm", "s_swappc_b64 s[30:31], s[0:1]"), "calls functions"),
        ((".amdhsa_kernel", ".other"), "no add_kernel came out"),
        (("add_kernel", "new_kernel"), "no add_kernel came out", "not listed in KERNELS"),
    ):
        found = script.faults("file", GOOD.replace(*change))
        assert len(found) == len(faults), found
        assert all(text in one for one, text in zip(found, faults, strict=True)), found
