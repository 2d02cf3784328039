"""torch.ops.kvcache_ops and torch.ops.communicators without a call of ours before; load()."""

import subprocess
import sys

import pytest

USE = {
    "kvcache_ops": (
        "import torch, kvcache_ops\n"
        "x = torch.randn(2, 8); out = torch.empty_like(x)\n"
        "torch.ops.kvcache_ops.rms_norm(out, x, torch.ones(8), 1e-6)\n"
        "assert torch.allclose(out, torch.nn.functional.rms_norm(x, [8], eps=1e-6))\n"
        "torch.ops.kvcache_ops.rms_norm.default(out.to('meta'), x.to('meta'), None, 1e-6)\n"
        "kvcache_ops.load()\n"
        "kvcache_ops.rms_norm(out, x, torch.ones(8), 1e-6)\n"
    ),
    "compiled": (
        "import torch, kvcache_ops\n"
        "def f(x):\n"
        "    out = torch.empty_like(x)\n"
        "    torch.ops.kvcache_ops.rms_norm(out, x, None, 1e-6)\n"
        "    return out * 2\n"
        "x = torch.randn(2, 8)\n"
        "got = torch.compile(f, backend='aot_eager', fullgraph=True)(x)\n"
        "assert torch.equal(got, f(x))\n"
    ),
    "communicators": (
        "import communicators, sys\n"
        "communicators.load()\n"
        "import torch\n"
        "assert torch.ops.communicators.native_version() == communicators.__version__\n"
        "assert torch.ops.communicators.shm_all_reduce(torch.ones(2, device='meta'), 0).is_meta\n"
    ),
    "at once": (
        "import threading, torch, kvcache_ops\n"
        "found = []\n"
        "ask = lambda: found.append(torch.ops.kvcache_ops.rms_norm.default)\n"
        "threads = [threading.Thread(target=ask) for _ in range(8)]\n"
        "for t in threads: t.start()\n"
        "for t in threads: t.join()\n"
        "assert len(set(found)) == 1 and len(found) == 8, found\n"
    ),
    "no such op": (
        "import torch, kvcache_ops\n"
        "assert not hasattr(torch.ops.kvcache_ops, 'no_such_op')\n"
        "assert hasattr(torch.ops.kvcache_ops, 'rms_norm')\n"
    ),
    "missing": (
        "import os; os.environ['COMMUNICATORS_NATIVE_DIR'] = '/nowhere'\n"
        "import torch, kvcache_ops\n"
        "from communicators.errors import NativeLibraryError\n"
        "for _ in range(2):\n"
        "    try: torch.ops.kvcache_ops.rms_norm\n"
        "    except NativeLibraryError as error: assert '/nowhere/_native_cpu.so' in str(error)\n"
        "    else: raise AssertionError('it was found')\n"
    ),
}


@pytest.mark.parametrize("what", USE)
def test_operators_are_there_without_a_call(what: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", USE[what]], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
