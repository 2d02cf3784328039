"""The kernels compile for gfx942; skipped where its compiler is not installed."""

import importlib.util
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
    if done.returncode == check_rocm().MISSING:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr


GOOD = """
kernel_a:
	buffer_wbl2 sc0 sc1
	buffer_inv sc0 sc1
	s_endpgm
	.section	.rodata
	.amdhsa_kernel kernel_a
; ScratchSize: 0
	.protected	kernel_b
"""


def test_faults_are_found():
    script = check_rocm()
    assert script.faults("all_reduce_streamed", GOOD) == []
    for change, fault in (
        (("; ScratchSize: 0", "; ScratchSize: 16"), "uses scratch memory, 16 bytes"),
        (("buffer_wbl2 sc0 sc1", "buffer_wbl2 sc1"), "0 releases of system scope"),
        (("buffer_inv sc0 sc1", "s_nop"), "0 acquires of system scope"),
        (("s_endpgm", "s_swappc_b64 s[30:31], s[0:1]"), "calls functions"),
        ((".amdhsa_kernel", ".other"), "no kernel came out"),
    ):
        (found,) = script.faults("all_reduce_streamed", GOOD.replace(*change))
        assert fault in found
