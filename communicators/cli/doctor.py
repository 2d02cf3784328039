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
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

from ..catalog import CATALOG
from ..groups import hosts

_PACKAGES = ("torch", "numpy", "pyzmq", "nvidia-ml-py", "rich", "mscclpp")
_OPTIONAL = {
    "pyzmq": "MessageQueue to other hosts",
    "nvidia-ml-py": "GPU topology",
    "rich": "progress bars of tune and p2p-check",
    "mscclpp": "PyMscclppCommunicator",
}


_GRACE_S = 1.0  # how long the other ranks of a trial may still say something after one has failed


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
        "--world-size",
        type=int,
        default=0,
        help="ranks of the trial group (default: all GPUs; 2 on the CPU where there are fewer)",
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
        findings += _trials(args.world_size, count, args.timeout)
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
    found = [
        Finding("machine", "system", None, f"{platform.system()} {platform.release()}"),
        Finding("machine", "cpu", None, f"{cpu}, {usable} cores usable{total}"),
        *([Finding("machine", "host", None, hidden)] if hidden else []),
    ]
    if platform.system() == "Linux" and not Path("/proc/self").exists():
        text = "not mounted: what is read there is missing here, and the trial says what that costs"
        found.append(Finding("machine", "/proc", None, text))
    return found


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

        from ..bindings.native import load
        from ..errors import NativeLibraryError
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
    text = f"{directory}: {_size(usage.free)} free of {_size(usage.total)}"
    if usage.free < needed:
        text += (
            f"; a group of two ranks takes up to {_size(needed)}: give the container more "
            f"(--shm-size), or set COMMUNICATORS_SHM_DIR or COMMUNICATORS_SHM_BYTES"
        )
    found.append(Finding("settings", "shared memory", usage.free >= needed, text))
    return found


def _size(count: int) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count} {unit}"
        count //= 1024
    return f"{count} GiB"


def _cache() -> list[Finding]:
    from ..errors import SettingsError
    from ..peer_access.p2p_cache import folder_problem
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
    """The GPUs that torch can use; where there are none, why not, as far as that is known."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch would warn of is asked for below
        if torch.cuda.is_available():
            return [
                Finding("gpus", f"cuda:{index}", True, torch.cuda.get_device_name(index))
                for index in range(torch.cuda.device_count())
            ]
        from ..peer_access.topology import Unknown, probe_gpus

        there = probe_gpus()
        if isinstance(there, Unknown) or not there:
            text = f"torch sees no GPU ({there})" if there else "torch and NVML see no GPU"
            return [Finding("gpus", "cuda", None, text)]
        found = [Finding("gpus", f"gpu {gpu.index}", None, gpu.name) for gpu in there]
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if torch.version.cuda is None and torch.version.hip is None:
            text = f"torch {torch.__version__} is a build for the CPU alone and cannot use them"
            return [*found, Finding("gpus", "cuda", None, text)]
        if hidden is not None:
            text = f"CUDA_VISIBLE_DEVICES={hidden!r} leaves torch no GPU"
            return [*found, Finding("gpus", "cuda", None, text)]
        try:
            torch.cuda.init()
            reason = "torch does not say why"
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0]
    text = f"driver {there[0].driver} shows the GPUs, and CUDA does not start: {reason}"
    return [*found, Finding("gpus", "cuda", False, text)]


def _trials(world_size: int, gpus: int, timeout_s: float) -> list[Finding]:
    """A trial on the GPUs where they are as many as the ranks, on the CPU otherwise.

    A GPU serves one rank of a group. So a single one shows that a rank opens on it, and nothing of
    what moves between GPUs.
    """
    if gpus >= max(world_size, 2):
        return _trial(world_size or gpus, timeout_s, "cuda")
    findings = _trial(world_size or 2, timeout_s, "cpu")
    if gpus:
        findings += _trial(1, timeout_s, "cuda")
        text = (
            f"{gpus} GPU here and one rank a GPU: nothing between GPUs was tried"
            if gpus == 1
            else f"{gpus} GPUs here and one rank a GPU: {world_size} ranks were tried on the CPU"
        )
        findings.append(Finding("collectives", "gpus", None, text))
    return findings


def _trial(world_size: int, timeout_s: float, device_type: str) -> list[Finding]:
    """Starts `world_size` ranks, adds a tensor, and reports what they say they use."""
    name, where = "trial", "on the CPU" if device_type == "cpu" else "on GPUs"
    if world_size == 1:
        name, where = f"{device_type}:0", "alone; nothing was moved"
    environment = dict(os.environ, WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1")
    environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "communicators.cli.trial", f"file://{directory}/store"]
        command += [str(timeout_s / 2), device_type]
        files = [Path(directory, f"{rank}.{of}") for rank in range(world_size) for of in "oe"]
        ranks = []
        try:
            for rank in range(world_size):
                with files[2 * rank].open("w") as out, files[2 * rank + 1].open("w") as errors:
                    ranks.append(
                        subprocess.Popen(
                            command,
                            env=dict(environment, RANK=str(rank), LOCAL_RANK=str(rank)),
                            stdout=out,
                            stderr=errors,
                        )
                    )
            ended = _until_the_end(ranks, time.monotonic() + timeout_s)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        texts = [file.read_text(errors="replace").strip() for file in files]
    failed = [rank for rank, status in enumerate(ended) if status]
    if failed:  # not those that were waiting for them
        last = [(texts[2 * rank + 1].splitlines() or ["no message"])[-1] for rank in failed]
        return [
            Finding("collectives", f"{name}, rank {rank}", False, text)
            for rank, text in zip(failed, last, strict=True)
        ]
    if None in ended:
        text = f"the {world_size} ranks did not finish within {timeout_s:g} s"
        return [Finding("collectives", name, False, text)]
    done = f"{world_size} ranks summed a tensor correctly" if world_size > 1 else "one rank opened"
    text = f"{done} {where}"
    return [
        Finding("collectives", name, True, text),
        *(Finding("collectives", "", None, line) for line in texts[0].splitlines()),
    ]


def _until_the_end(ranks: list[subprocess.Popen[bytes]], deadline: float) -> list[int | None]:
    """The exit statuses; None for a rank that runs at the deadline, or when another has failed."""
    while time.monotonic() < deadline:
        statuses = [process.poll() for process in ranks]
        if None not in statuses:
            return statuses
        if any(statuses):
            deadline = min(deadline, time.monotonic() + _GRACE_S)
        time.sleep(0.02)
    return [process.poll() for process in ranks]
