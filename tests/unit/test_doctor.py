"""communicators doctor: what it finds, and that its exit status and message are right."""

import importlib.metadata
import json
import subprocess
import sys

import pytest

from communicators import native
from communicators.cli import main
from communicators.errors import NativeLibraryError


@pytest.fixture(autouse=True)
def _no_trial(monkeypatch, request):
    """Most tests look at one finding; starting ranks for each would only cost time."""
    if "with_trial" not in request.keywords:
        monkeypatch.setattr("communicators.cli.doctor._trial", lambda *_: [])


def doctor(capsys, *options):
    status = main(["doctor", "--json", *options])
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] == (status == 0)
    return status, {f["name"]: f for f in report["findings"] if f["name"]}


def test_a_sound_machine_exits_0(capsys):
    status, findings = doctor(capsys)
    assert status == 0
    assert findings["torch"]["ok"]
    assert findings["native cpu"]["ok"]
    assert "free of" in findings["shared memory"]["text"]
    assert "never executed on AMD" in findings["CustomAllreduce"]["text"]


def test_an_unusable_shared_memory_directory(capsys, monkeypatch):
    monkeypatch.setenv("COMMUNICATORS_SHM_DIR", "/proc")
    status, findings = doctor(capsys)
    assert status == 1
    assert findings["shared memory"]["ok"] is False
    assert "/proc cannot be used" in findings["shared memory"]["text"]


def test_a_setting_that_is_not_accepted(capsys, monkeypatch):
    monkeypatch.setenv("COMMUNICATORS_TIMEOUT_S", "never")
    status, findings = doctor(capsys)
    assert status == 1
    assert "COMMUNICATORS_TIMEOUT_S='never'" in findings["environment"]["text"]


def test_no_torch_is_a_finding_and_not_a_traceback(capsys, monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "torch":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    status, findings = doctor(capsys)
    assert status == 1
    assert findings["torch"]["text"] == "not installed; pip install torch"


def test_the_command_starts_where_torch_cannot_be_imported():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from communicators.cli import main\n"
        "sys.exit(main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "BROKEN torch import" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_mismatched_library(capsys, monkeypatch):
    def load(name):
        raise NativeLibraryError(f"{name} is version 0.0.1, and the Python package is 0.1.0")

    monkeypatch.setattr(native, "load", load)
    status, findings = doctor(capsys)
    assert status == 1
    assert "is version 0.0.1" in findings["native cpu"]["text"]


@pytest.mark.with_trial
def test_the_trial_group_says_what_it_uses(capsys):
    assert main(["doctor", "--world-size", "2"]) == 0
    printed = capsys.readouterr().out
    assert "2 ranks summed a tensor correctly" in printed
    assert "any size: cpu_shm" in printed
    assert printed.rstrip().endswith("nothing is broken")


@pytest.mark.with_trial
def test_ranks_that_do_not_come_up_are_broken_within_the_deadline(capsys):
    status, findings = doctor(capsys, "--world-size", "2", "--timeout", "0.2")
    assert status == 1
    assert "did not finish within 0.2 s" in findings["trial"]["text"]
