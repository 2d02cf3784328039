"""communicators doctor: what it finds, and that its exit status and message are right."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch

from communicators.bindings import native
from communicators.cli import doctor as module
from communicators.cli import main
from communicators.errors import NativeLibraryError
from communicators.peer_access import topology
from communicators.peer_access.topology import Unknown
from tests.unit.test_topology import machine


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
    assert "2 ranks summed a tensor correctly on the CPU" in printed
    assert "any size: cpu_shm" in printed
    assert printed.rstrip().endswith("nothing is broken")


@pytest.mark.with_trial
def test_ranks_that_do_not_come_up_are_broken_within_the_deadline(capsys):
    status, findings = doctor(capsys, "--world-size", "2", "--timeout", "0.2")
    assert status == 1
    assert "did not finish within 0.2 s" in findings["trial"]["text"]


@pytest.fixture
def gpus(monkeypatch):
    """A machine with so many GPUs as torch sees them; what trials were started is returned."""
    started = []

    def there(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU number {index}")
        monkeypatch.setattr(native, "load", lambda name: f"{name}.so")
        monkeypatch.setattr(module, "_trial", lambda *how: started.append(how) or [])
        return started

    return there


@pytest.mark.parametrize(
    ("count", "options", "trials"),
    [
        (0, (), [(2, "cpu")]),
        (0, ("--world-size", "3"), [(3, "cpu")]),
        (1, (), [(2, "cpu"), (1, "cuda")]),
        (1, ("--world-size", "1"), [(1, "cpu"), (1, "cuda")]),
        (1, ("--world-size", "2"), [(2, "cpu"), (1, "cuda")]),
        (2, (), [(2, "cuda")]),
        (4, (), [(4, "cuda")]),
        (4, ("--world-size", "2"), [(2, "cuda")]),
        (2, ("--world-size", "4"), [(4, "cpu"), (1, "cuda")]),
    ],
)
def test_no_two_ranks_of_a_trial_share_a_gpu(capsys, gpus, count, options, trials):
    started = gpus(count)
    status, findings = doctor(capsys, *options)
    assert status == 0
    assert [(world_size, device) for world_size, _, device in started] == trials
    if count and trials[0][1] == "cpu":
        assert findings["gpus"]["ok"] is None and "one rank a GPU" in findings["gpus"]["text"]
    if count == 1:
        assert "nothing between GPUs was tried" in findings["gpus"]["text"]


@pytest.fixture
def unusable_gpus(monkeypatch):
    """NVML shows two GPUs, and CUDA does not start."""

    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found 11040).\nMore.")

    monkeypatch.setattr(topology, "probe_gpus", lambda: machine(2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_an_old_driver_is_named(capsys, unusable_gpus):
    status, findings = doctor(capsys)
    assert status == 1
    assert findings["gpu 1"]["text"] == "NVIDIA H200"
    text = findings["cuda"]["text"]
    assert findings["cuda"]["ok"] is False and machine(2)[0].driver in text
    assert text.endswith("CUDA does not start: The NVIDIA driver on your system is too old (found "
                         "11040).")  # fmt: skip


def test_gpus_that_were_not_meant_to_be_used(capsys, monkeypatch, unusable_gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    status, findings = doctor(capsys)
    assert status == 0 and findings["cuda"]["text"] == "CUDA_VISIBLE_DEVICES='' leaves torch no GPU"
    monkeypatch.setattr(torch.version, "cuda", None)
    status, findings = doctor(capsys)
    assert status == 0 and "is a build for the CPU alone" in findings["cuda"]["text"]


@pytest.mark.parametrize(
    ("there", "text"),
    [([], "torch and NVML see no GPU"), (Unknown("no NVML"), "torch sees no GPU (no NVML)")],
)
def test_no_gpu(capsys, monkeypatch, there, text):
    monkeypatch.setattr(topology, "probe_gpus", lambda: there)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, findings = doctor(capsys)
    assert status == 0 and findings["cuda"]["text"] == text


@pytest.mark.with_trial
def test_a_rank_that_fails_ends_the_trial(monkeypatch):
    """Its peers would wait for it until the deadline."""
    code = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit('out of luck')\n"
    real = subprocess.Popen

    def popen(command, **how):
        return real([sys.executable, "-c", code + "time.sleep(60)"], **how)

    monkeypatch.setattr(subprocess, "Popen", popen)
    began = time.monotonic()
    (finding,) = module._trial(2, 60.0, "cpu")
    assert time.monotonic() - began < 15
    assert (finding.name, finding.ok, finding.text) == ("trial, rank 1", False, "out of luck")


in_a_namespace = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None or not sys.platform.startswith("linux"),
    reason="mounts need root and unshare",
)


def doctor_behind(mount, **environment):
    """The whole command in a mount namespace of its own."""
    shell = f"{mount} && exec {sys.executable} -m communicators.cli doctor --json"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", shell],
        capture_output=True,
        text=True,
        env=dict(os.environ, **environment),
        timeout=120,
    )
    assert "Traceback" not in done.stderr, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] == (done.returncode == 0)
    return report["findings"]


@in_a_namespace
def test_without_proc():
    findings = doctor_behind("mount -t tmpfs none /proc")
    by_name = {f["name"]: f for f in findings}
    assert not [f for f in findings if f["ok"] is False]
    assert "not mounted" in by_name["/proc"]["text"]
    assert by_name["trial"]["text"] == "2 ranks summed a tensor correctly on the CPU"


@in_a_namespace
def test_64_kb_of_shared_memory(tmp_path):
    findings = doctor_behind(
        f"mount -t tmpfs -o size=64k none {tmp_path}", COMMUNICATORS_SHM_DIR=str(tmp_path)
    )
    by_name = {f["name"]: f for f in findings}
    assert [f["name"] for f in findings if f["ok"] is False] == ["shared memory"]
    assert (
        "64 KiB free of 64 KiB; a group of two ranks takes up to 8 MiB"
        in (by_name["shared memory"]["text"])
    )
    assert by_name["trial"]["text"] == "2 ranks summed a tensor correctly on the CPU"
    assert any("torch_distributed, the first in order" in f["text"] for f in findings)
