"""What importing does, and what the loader of the native libraries says."""

import subprocess
import sys

import pytest

import communicators
from communicators.bindings import native
from communicators.errors import NativeLibraryError


def test_importing_touches_neither_torch_nor_our_environment():
    code = (
        "import os, sys\n"
        "class Seen(dict):\n"
        "    asked = []\n"
        "    def get(self, key, default=None):\n"
        "        self.asked.append(key)\n"
        "        return dict.get(self, key, default)\n"
        "    def __getitem__(self, key):\n"
        "        self.asked.append(key)\n"
        "        return dict.__getitem__(self, key)\n"
        "os.environ = Seen(os.environ)\n"
        "import communicators, kvcache_ops.reference\n"
        "from communicators import Group, Settings, parallel_state\n"
        "ours = [k for k in Seen.asked if k.startswith(('COMMUNICATORS', 'KVCACHE', 'WORLD'))]\n"
        "assert not ours, ours\n"
    )
    bare = "import sys, communicators; assert 'torch' not in sys.modules"
    for source in (code, bare):
        done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_every_public_name_exists():
    assert set(communicators._HOME_OF) <= set(communicators.__all__)
    for name in communicators.__all__:
        assert getattr(communicators, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = communicators.nothing


def test_the_native_library_is_of_this_version():
    assert native.load("cpu").name == "_native_cpu.so"


def test_a_missing_library_says_where_it_was_looked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    monkeypatch.setattr(native, "_DISTRIBUTION", "no-such-distribution")
    with pytest.raises(NativeLibraryError, match=r"_native_cpu\.so was not found; looked at"):
        native.library_path("cpu")


def test_a_broken_library_says_why(tmp_path):
    broken = tmp_path / "_native_cpu.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(NativeLibraryError, match="cannot be loaded by torch"):
        native._load(broken)


def test_a_library_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(native, "__version__", "9.9.9")
    native.load.cache_clear()
    try:
        with pytest.raises(NativeLibraryError, match=r"is version .* and the Python package is 9"):
            native.load("cpu")
    finally:
        native.load.cache_clear()
