"""torch.ops.kvcache_ops and torch.ops.communicators without a call of ours before; load()."""

import subprocess
import sys

import pytest

from communicators.errors import NativeLibraryError
from kvcache_ops import _native

FIRST_USE = """
import communicators
communicators.load()
import torch
assert torch.ops.communicators.native_version() == communicators.__version__
assert torch.ops.communicators.shm_all_reduce(torch.ones(2, device="meta"), 0).is_meta

import threading, kvcache_ops
found = []
ask = lambda: found.append(torch.ops.kvcache_ops.rms_norm.default)
threads = [threading.Thread(target=ask) for _ in range(8)]
for t in threads: t.start()
for t in threads: t.join()
assert len(set(found)) == 1 and len(found) == 8, found

x = torch.randn(2, 8)
out = torch.empty_like(x)
torch.ops.kvcache_ops.rms_norm(out, x, torch.ones(8), 1e-6)
assert torch.allclose(out, torch.nn.functional.rms_norm(x, [8], eps=1e-6), atol=1e-6)
torch.ops.kvcache_ops.rms_norm.default(out.to("meta"), x.to("meta"), None, 1e-6)
kvcache_ops.load()
kvcache_ops.rms_norm(out, x, torch.ones(8), 1e-6)
assert not hasattr(torch.ops.kvcache_ops, "no_such_op")
"""
FIRST_USE_COMPILED = """
import torch, kvcache_ops
def twice(x):
    out = torch.empty_like(x)
    torch.ops.kvcache_ops.rms_norm(out, x, None, 1e-6)
    return out * 2
x = torch.randn(2, 8)
got = torch.compile(twice, backend="aot_eager", fullgraph=True)(x)
assert torch.equal(got, twice(x))
"""


@pytest.mark.parametrize("program", [FIRST_USE, FIRST_USE_COMPILED], ids=["eager", "compiled"])
def test_operators_are_there_without_a_call(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_a_library_that_is_missing_is_named_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise NativeLibraryError("_native_cpu.so was not found")

    monkeypatch.setattr(_native, "load", missing)
    namespace = _native._OpsOnDemand("kvcache_ops")
    for _ in range(2):
        with pytest.raises(NativeLibraryError, match="was not found"):
            _ = namespace.rms_norm
    monkeypatch.undo()
    assert namespace.rms_norm.default._schema.name == "kvcache_ops::rms_norm"
