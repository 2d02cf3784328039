"""What a real write and read-back shows of peer access, remembered, and one verdict for a group.

Drivers claim peer access that does not work, so pairs of GPUs are tried once: two processes move
bytes (p2p_worker.py), under a deadline, since a broken driver may also never answer. The outcome
holds until the next boot or driver, and is kept in a file by the GPUs' UUIDs. Starting the probe is
a step of its own (`probe`, `group_verdict`); the predicates only look up what is known.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait

import torch

from ..base import Refusal
from ..bindings.library import find_loaded_library
from ..errors import CommunicatorError
from ..groups.group import Group
from ..settings import Settings
from .p2p_cache import P2PCache, Pair, PairResult
from .p2p_worker import (
    MEASURED_BYTES,
    PROOF_BYTES,
    Report,
    consumer,
    producer,
    update_environment_variables,
)
from .topology import (
    GpuFacts,
    Unknown,
    Verdict,
    VisibleGpu,
    decide,
    local_facts,
    probe_gpus,
    probe_host,
    visible_gpus,
)

__all__ = [
    "Attempt",
    "can_actually_p2p",
    "consumer",
    "gpu_p2p_access_check",
    "group_verdict",
    "is_weak_contiguous",
    "probe",
    "producer",
    "survey",
    "try_pairs",
    "update_environment_variables",
]

#: Of one ordered pair: the producer's report (owner of the memory) and the consumer's.
Attempt = tuple[Report, Report]

_START_S = 60.0  # for the processes to start and import torch
_PAIR_S = 15.0  # for one pair: two CUDA contexts and a few copies


class _Workers:
    """A producer and a consumer process working through the same list of pairs."""

    def __init__(self, pairs: Sequence[Pair], options: Sequence[str]) -> None:
        handles, acknowledgements = os.pipe(), os.pipe()
        ends = {
            "producer": (handles[1], acknowledgements[0], [owner for _, owner in pairs]),
            "consumer": (handles[0], acknowledgements[1], [accessor for accessor, _ in pairs]),
        }
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.reports: dict[Connection, str] = {}  # where each role's reports arrive
        try:
            for role, (give, take, devices) in ends.items():
                self._start(role, (give, take), devices, options)
        except OSError:
            self.stop()
            raise
        finally:
            for end in (*handles, *acknowledgements):
                os.close(end)

    def _start(
        self, role: str, pipes: tuple[int, int], devices: Sequence[int], options: Sequence[str]
    ) -> None:
        # The parent's import path, and not its __main__: a job's script is not run again.
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__package__}.p2p_worker import main"
        read, write = os.pipe()
        self.reports[Connection(read, writable=False)] = role
        command = [sys.executable, "-c", f"{code}; main(sys.argv[1:])", role]
        command += ["--devices", ",".join(map(str, devices))]
        command += ["--pipes", f"{pipes[0]},{pipes[1]},{write}", *options]
        try:
            self._processes[role] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=(*pipes, write)
            )
        finally:
            os.close(write)

    def end_of(self, role: str) -> str:
        """How a process that closed its pipe has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._processes[role].wait(timeout=2)
            return f"the {role} process died with status {status}"
        return f"the {role} process closed its pipe"

    def stop(self) -> None:
        """Ends both. One that hangs inside the driver may outlive SIGKILL; it is not waited for."""
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=2)
        for connection in self.reports:
            connection.close()


def try_pairs(
    pairs: Sequence[tuple[int, int]],
    *,
    cuda_visible_devices: str | None = None,
    size: int = PROOF_BYTES,
    timeout_s: float = 60.0,
    cudart: str | None = None,
) -> list[Attempt]:
    """Tries ordered pairs of CUDA ordinals (accessor, owner); returns within about `timeout_s`.

    A pair whose processes crash or do not answer is reported so, the processes are ended, and the
    next pair gets new ones.

    Args:
        cuda_visible_devices: what the ordinals count in; default: as in this process.
        size: bytes of the memory; above PROOF_BYTES copies are measured too.
        cudart: path of the CUDA runtime; default: the one that torch loads.
    """
    deadline = time.monotonic() + timeout_s
    options = ["--size", str(size), "--timeout", str(timeout_s)]
    options += [] if cuda_visible_devices is None else ["--visible", cuda_visible_devices]
    # By path, so that the processes need not import torch to find it.
    cudart = cudart or find_loaded_library("libcudart") or find_loaded_library("libamdhip64")
    options += [] if cudart is None else ["--cudart", cudart]
    found: list[Attempt] = []
    while len(found) < len(pairs):
        if time.monotonic() >= deadline:
            found.append(_both(f"not tried within the deadline of {timeout_s:g} s", True))
            continue
        workers = _Workers(pairs[len(found) :], options)
        try:
            found += _collect(workers, len(pairs) - len(found), deadline)
        finally:
            workers.stop()
    return found


def _both(reason: str, transient: bool = False) -> Attempt:
    producer_report = Report("producer", -1, reason, transient)
    return producer_report, Report("consumer", -1, reason, transient)


def _collect(workers: _Workers, count: int, deadline: float) -> list[Attempt]:
    """The attempts of one couple of processes, up to the first that fails to answer."""
    found: list[Attempt] = []
    half: dict[str, Report] = {}
    started: set[str] = set()
    until = min(deadline, time.monotonic() + _START_S)
    while len(found) < count:
        # A side that has reported this pair may already have ended: only the other one is read.
        waiting = [pipe for pipe, role in workers.reports.items() if role not in half]
        ready = wait(waiting, max(0.0, until - time.monotonic()))
        if not ready:
            silent = " and the ".join(workers.reports[pipe] for pipe in waiting)
            what = f"answer within {_PAIR_S:g} s" if len(started) == 2 else "start"
            reason = f"the {silent} did not {what} (or before the deadline of all pairs)"
            return [*found, _both(reason, transient=len(started) < 2)]
        for pipe in ready:
            assert isinstance(pipe, Connection)
            role = workers.reports[pipe]
            try:
                report: Report = pipe.recv()
            except (EOFError, ConnectionError):
                return [*found, _both(workers.end_of(role), transient=role not in started)]
            if report.index < 0 and report.reason:  # it has no CUDA runtime: nothing can be tried
                return found + [_both(report.reason, transient=True)] * (count - len(found))
            if report.index < 0:
                started.add(role)
            else:
                half[role] = report
        if len(half) == 2:
            found.append((half.pop("producer"), half.pop("consumer")))
        if not half and len(started) == 2:
            until = min(deadline, time.monotonic() + _PAIR_S)
    return found


def can_actually_p2p(
    batch_src: Sequence[int],
    batch_tgt: Sequence[int],
    *,
    timeout_s: float | None = None,
    cudart: str | None = None,
) -> Sequence[bool]:
    """Whether bytes really move between the memory of src[i] and GPU tgt[i], in both directions.

    Starts processes and takes seconds; `gpu_p2p_access_check` looks up what is known.

    Args:
        batch_src: CUDA ordinals of the GPUs that own the memory.
        batch_tgt: CUDA ordinals, as many, of the GPUs that read and write it.
    """
    if len(batch_src) != len(batch_tgt):
        raise ValueError(
            f"can_actually_p2p: {len(batch_src)} sources and {len(batch_tgt)} targets are given; "
            "they must be as many"
        )
    limit = Settings.from_environment().p2p_probe_timeout_s if timeout_s is None else timeout_s
    pairs = list(zip(batch_tgt, batch_src, strict=True))
    return [
        not (owner.reason or accessor.reason)
        for owner, accessor in try_pairs(pairs, timeout_s=limit, cudart=cudart)
    ]


def outcome(attempt: Attempt) -> Refusal | None:
    """None when both sides were content, else why not; Unknown when it could not be tried."""
    failed = [report for report in attempt if report.reason]
    if not failed:
        return None
    reasons = "; ".join(dict.fromkeys(f"{one.role}: {one.reason}" for one in failed))
    if len({one.reason for one in failed}) == 1 and len(failed) == 2:
        reasons = failed[0].reason
    return Unknown(reasons) if any(one.transient for one in failed) else Refusal(reasons)


def survey(
    gpus: Sequence[GpuFacts],
    settings: Settings | None = None,
    *,
    refresh: bool = False,
    measure: bool = False,
    cudart: str | None = None,
) -> dict[tuple[str, str], PairResult]:
    """What is proven of every ordered pair (accessor's UUID, owner's UUID) of these GPUs.

    Takes what the cache holds, tries the rest (all, with `refresh`), and adds it to the cache. A
    pair that could not be tried at all is an Unknown, and is not remembered.

    Args:
        measure: bandwidth and latency are wanted too.
    """
    settings = Settings.from_environment() if settings is None else settings
    cache = P2PCache(settings.cache_dir, probe_host(), gpus[0].driver if gpus else "")
    known = {} if refresh else cache.read()
    wanted = [(a.uuid, b.uuid) for a in gpus for b in gpus if a.uuid != b.uuid]
    missing = [
        pair
        for pair in wanted
        if (one := known.get(pair)) is None
        or (measure and one.failure is None and not one.measured)
    ]
    if missing:
        ordinal = {gpu.uuid: index for index, gpu in enumerate(gpus)}
        attempts = try_pairs(
            [(ordinal[accessor], ordinal[owner]) for accessor, owner in missing],
            cuda_visible_devices=",".join(ordinal),
            size=MEASURED_BYTES if measure else PROOF_BYTES,
            timeout_s=settings.p2p_probe_timeout_s,
            cudart=cudart,
        )
        for pair, attempt in zip(missing, attempts, strict=True):
            known[pair] = PairResult(outcome(attempt), attempt[1].measured)
        tried = [pair for pair in missing if not isinstance(known[pair].failure, Unknown)]
        cache.add({pair: known[pair] for pair in tried}, gpus)
    return {pair: known[pair] for pair in wanted}


def probe(
    gpus: Sequence[GpuFacts],
    settings: Settings | None = None,
    *,
    refresh: bool = False,
    cudart: str | None = None,
) -> dict[tuple[str, str], Refusal | None]:
    """The proofs of a survey, for topology.decide.

    A pair that could not be tried at all (no memory free, deadline used up by others) is left out,
    so its claim stands.
    """
    found = survey(gpus, settings, refresh=refresh, cudart=cudart)
    return {
        pair: one.failure for pair, one in found.items() if not isinstance(one.failure, Unknown)
    }


_verdicts: weakref.WeakKeyDictionary[Group, Verdict] = weakref.WeakKeyDictionary()


def group_verdict(group: Group, device: torch.device) -> Verdict:
    """What topology and proofs allow this group: the same answer on every rank, found once.

    Collective on the first call for a group. Rank 0 probes for all, unless COMMUNICATORS_P2P_PROBE
    is 0 there, or the claims alone already rule peer access out.
    """
    if group in _verdicts:
        return _verdicts[group]
    facts = group.gather_objects("p2p.facts", local_facts(group.rank, device, None, group.settings))
    claimed = decide(facts)
    hopeless = claimed.host or claimed.gpus or (group.world_size > 2 and claimed.nvlink)
    proofs: dict[tuple[str, str], Refusal | None] | str | None = None
    if group.rank == 0 and not hopeless and group.settings.p2p_probe:
        gpus = [fact.device.gpu for fact in facts if isinstance(fact.device, VisibleGpu)]
        try:
            proofs = probe(gpus, group.settings)
        except (OSError, CommunicatorError) as error:
            proofs = f"the peer-access probe failed on rank 0: {error}"
    patience = group.settings.timeout_s + group.settings.p2p_probe_timeout_s + _START_S
    proofs = group.broadcast_object(proofs, src=0, timeout_s=patience)
    if isinstance(proofs, str):
        raise CommunicatorError(proofs)
    _verdicts[group] = decide(facts, proofs)
    return _verdicts[group]


def gpu_p2p_access_check(src: int, tgt: int) -> bool:
    """Whether GPU `src` can access the memory of GPU `tgt`: proven, or else claimed by the driver.

    Looks up the cache and NVML; starts nothing. False where neither knows.

    Args:
        src, tgt: CUDA ordinals, as this process sees them.
    """
    if src == tgt:
        return True
    settings, gpus = Settings.from_environment(), probe_gpus()
    if isinstance(gpus, Unknown):
        return False
    visible = visible_gpus(gpus, settings.cuda_visible_devices, settings.cuda_device_order)
    if isinstance(visible, Unknown) or max(src, tgt) >= len(visible):
        return False
    accessor, owner = visible[src].gpu, visible[tgt].gpu
    known = P2PCache(settings.cache_dir, probe_host(), accessor.driver).read()
    if settings.p2p_probe and (accessor.uuid, owner.uuid) in known:
        return known[accessor.uuid, owner.uuid].failure is None
    claim = accessor.peer(owner.uuid)
    return claim is not None and bool(claim.read and claim.write)


def is_weak_contiguous(inp: torch.Tensor) -> bool:
    """Whether the tensor's elements fill one block of memory, in whatever order of dimensions.

    Such a tensor can be moved as raw bytes between ranks that hold it with the same strides.
    """
    if inp.is_contiguous():
        return True
    storage = inp.untyped_storage().nbytes() - inp.storage_offset() * inp.element_size()
    return storage == inp.numel() * inp.element_size()
