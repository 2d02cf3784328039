"""`communicators doctor`: what this machine has, what is broken, and what would be used.

The facts are read without torch where that is possible, so that a missing torch is a finding and
not a traceback. What each collective would use is not derived a second time: a small group of
ranks is started on this machine and asked for its own `explain()`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from .. import hosts
from ..catalog import CATALOG

_PACKAGES = ("torch", "numpy", "pyzmq", "nvidia-ml-py", "rich", "mscclpp")
_OPTIONAL = {
    "pyzmq": "MessageQueue to other hosts",
    "nvidia-ml-py": "GPU topology",
    "rich": "progress bars of tune and p2p-check",
    "mscclpp": "PyMscclppCommunicator",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report. ok: True fine, False broken, None only information."""

    section: str
    name: str
    ok: bool | None
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--world-size", type=int, default=0, help="ranks of the trial group (default: GPUs, or 2)"
    )
    parser.add_argument(
        "--timeout", type=float, default=60.0, help="seconds that the trial group may take"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the report; 1 when something is broken."""
    findings = [*_machine(), *_libraries(), *_settings(), *_communicators()]
    torch_works = not any(f.section == "libraries" and f.ok is False for f in findings)
    if torch_works:
        findings += _cache()
        gpus = _gpus()
        findings += gpus
        count = sum(1 for finding in gpus if finding.ok)
        findings += _trial(args.world_size or max(count, 2), args.timeout)
    broken = [finding for finding in findings if finding.ok is False]
    if args.json:
        print(json.dumps({"ok": not broken, "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        _print(findings, broken)
    return 1 if broken else 0


def _print(findings: list[Finding], broken: list[Finding]) -> None:
    section, width = "", 14
    for finding in findings:
        if finding.section != section:
            section = finding.section
            width = max(14, *(len(f.name) for f in findings if f.section == section))
            print(f"{section}")
        mark = {True: "ok", False: "BROKEN", None: "-"}[finding.ok]
        print(f"  {mark:6} {finding.name:{width}} {finding.text}" if finding.name else finding.text)
    if broken:
        print(f"{len(broken)} broken: {', '.join(finding.name for finding in broken)}")
    else:
        print("nothing is broken")


def _machine() -> list[Finding]:
    cpu = platform.processor() or platform.machine()
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    memory = _read("/proc/meminfo").split("\n", 1)[0].split()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    hidden = hosts.missing()
    total = f", {int(memory[1]) // 1024**2} GiB of memory" if len(memory) > 1 else ""
    return [
        Finding("machine", "system", None, f"{platform.system()} {platform.release()}"),
        Finding("machine", "cpu", None, f"{cpu}, {usable} cores usable{total}"),
        *([Finding("machine", "host", None, hidden)] if hidden else []),
    ]


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _libraries() -> list[Finding]:
    found = [Finding("libraries", "python", None, platform.python_version())]
    for name in _PACKAGES:
        try:
            version = importlib.metadata.version(name)
            found.append(Finding("libraries", name, True, version))
        except importlib.metadata.PackageNotFoundError:
            if name in _OPTIONAL:
                text = f"not installed; only {_OPTIONAL[name]} needs it"
                found.append(Finding("libraries", name, None, text))
            else:
                text = f"not installed; pip install {name}"
                found.append(Finding("libraries", name, False, text))
    if found[1].ok is False:  # without torch nothing further can be loaded
        return found
    try:
        import torch

        from ..errors import NativeLibraryError
        from ..native import load
    except ImportError as error:
        return [*found, Finding("libraries", "torch import", False, str(error))]
    for library, needed in (("cpu", True), ("cuda", torch.cuda.is_available())):
        try:
            found.append(Finding("libraries", f"native {library}", True, str(load(library))))
        except NativeLibraryError as error:
            found.append(
                Finding("libraries", f"native {library}", False if needed else None, str(error))
            )
    return found


def _settings() -> list[Finding]:
    from ..errors import SettingsError
    from ..settings import Settings

    try:
        settings = Settings.from_environment()
    except SettingsError as error:
        return [Finding("settings", "environment", False, str(error))]
    changed = [
        f"{name}={value}"
        for (name, value, _), (_, default, _) in zip(
            settings.describe(), Settings().describe(), strict=True
        )
        if value != default
    ]
    found = [Finding("settings", "environment", True, ", ".join(changed) or "all defaults")]
    directory = settings.shm_dir
    try:
        with tempfile.TemporaryFile(dir=directory):
            usage = shutil.disk_usage(directory)
    except OSError as error:
        found.append(
            Finding("settings", "shared memory", False, f"{directory} cannot be used: {error}")
        )
        return found
    needed = 2 * settings.shm_bytes
    text = f"{directory}: {usage.free >> 20} MiB free of {usage.total >> 20}"
    if usage.free < needed:
        text += f"; a group of two ranks takes up to {needed >> 20} MiB"
    found.append(Finding("settings", "shared memory", usage.free >= needed, text))
    return found


def _cache() -> list[Finding]:
    from ..errors import SettingsError
    from ..p2p_cache import folder_problem
    from ..settings import Settings

    try:
        problem = folder_problem(Settings.from_environment().cache_dir)
    except SettingsError:  # a finding already
        return []
    return [Finding("gpus", "proofs", None, problem)] if problem else []


def _communicators() -> list[Finding]:
    """How far each has been seen to work, anywhere; what runs here is the trial's to say."""
    return [
        Finding("communicators", name, None, entry.told())
        for entry in CATALOG
        for name in entry.classes
    ]


def _gpus() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        return [Finding("gpus", "cuda", None, "torch sees no GPU")]
    return [
        Finding("gpus", f"cuda:{index}", True, torch.cuda.get_device_name(index))
        for index in range(torch.cuda.device_count())
    ]


def _trial(world_size: int, timeout_s: float) -> list[Finding]:
    """Starts `world_size` ranks, adds a tensor, and reports what they say they use."""
    environment = dict(os.environ, WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1")
    environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    with tempfile.TemporaryDirectory() as directory:
        store = f"file://{directory}/store"
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "communicators.cli.trial", store, str(timeout_s / 2)],
                env=dict(environment, RANK=str(rank), LOCAL_RANK=str(rank)),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world_size)
        ]
        outputs = []
        try:
            for process in ranks:
                outputs.append((*process.communicate(timeout=timeout_s), process.returncode))
        except subprocess.TimeoutExpired:
            text = f"the {world_size} ranks did not finish within {timeout_s:g} s"
            return [Finding("collectives", "trial", False, text)]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
    for rank, (_, errors, status) in enumerate(outputs):
        if status:
            last = (errors.strip().splitlines() or ["no message"])[-1]
            return [Finding("collectives", f"rank {rank}", False, last)]
    return [
        Finding("collectives", "trial", True, f"{world_size} ranks summed a tensor correctly"),
        *(Finding("collectives", "", None, line) for line in outputs[0][0].splitlines()),
    ]
