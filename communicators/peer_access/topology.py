"""Which GPUs the ranks of a group are on, and what may be concluded from it.

Facts first, decision second: each rank collects its `RankFacts` (local, no communication), the
group gathers them, and `decide` is a pure function of all of them. It needs no GPU, so a test can
feed it eight made-up ranks. What a real copy showed (p2p.py) comes in beside the claims.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import combinations

import torch

from ..base import Refusal
from ..bindings.nvml import (
    GpuFacts,
    PeerFacts,
    Unknown,
    is_full_nvlink,
    read_gpus,
    with_nvml_context,
)
from ..groups.hosts import boot_id
from ..settings import Settings

__all__ = [
    "GpuFacts",
    "HostFacts",
    "PeerFacts",
    "RankFacts",
    "Unknown",
    "Verdict",
    "VisibleGpu",
    "decide",
    "is_full_nvlink",
    "local_facts",
    "probe_gpus",
    "probe_host",
    "visible_gpus",
    "with_nvml_context",
]

#: Of an ordered pair (accessor's UUID, owner's UUID): None when a real copy worked, else why not.
Proofs = Mapping[tuple[str, str], "Refusal | None"]


@dataclass(frozen=True)
class HostFacts:
    """One running kernel. Ranks with equal boot ids can map each other's memory."""

    name: str
    boot_id: str


@dataclass(frozen=True)
class VisibleGpu:
    """What one CUDA ordinal stands for: a physical GPU, or a MIG instance (its UUID) on it."""

    gpu: GpuFacts
    mig: str = ""


@dataclass(frozen=True)
class RankFacts:
    """What one rank knows of its place."""

    rank: int
    host: HostFacts
    device: VisibleGpu | Unknown


@dataclass(frozen=True)
class Verdict:
    """What the facts of all ranks allow. Each field is None, or the reason why not.

    host: all ranks are on one host.   gpus: each rank has a physical GPU of its own.
    p2p: every rank can read and write every other's memory (proven, or else claimed).
    nvlink: every pair is connected by NVLink.
    """

    world_size: int
    host: Refusal | None
    gpus: Refusal | None
    p2p: Refusal | None
    nvlink: Refusal | None

    @property
    def refusal(self) -> Refusal | None:
        """Why kernels that use the peers' memory are out, or None when they may be used.

        Two GPUs may also talk over PCIe; for more, full NVLink is a condition.
        """
        first = self.host or self.gpus or self.p2p
        return first or (self.nvlink if self.world_size > 2 else None)


def probe_host() -> HostFacts:
    """This host's name and boot id."""
    return HostFacts(socket.gethostname(), boot_id())


def probe_gpus() -> list[GpuFacts] | Unknown:
    """The physical GPUs of this host with what driver and NVML claim, or why that is not known."""
    return read_gpus()


def visible_gpus(
    gpus: Sequence[GpuFacts], visible: str | None, order: str = ""
) -> list[VisibleGpu] | Unknown:
    """What CUDA's ordinals 0, 1, ... stand for, by the rules of CUDA_VISIBLE_DEVICES.

    Entries are indices, UUIDs or unambiguous beginnings of them (`GPU-8932f`), or MIG instances
    (`MIG-<uuid>`, or the older `MIG-GPU-<uuid>/gi/ci`); the first invalid entry ends the list, and
    a GPU named twice makes it empty. Rules: CUDA C++ Programming Guide, "CUDA Environment
    Variables".

    Args:
        gpus: all physical GPUs, in NVML's order.
        visible: the value of CUDA_VISIBLE_DEVICES; None when it is not set.
        order: the value of CUDA_DEVICE_ORDER, "" when it is not set. CUDA's default is fastest
            first; NVML's order is by PCI.
    """
    entries = [str(gpu.index) for gpu in gpus] if visible is None else visible.split(",")
    entries = [entry.strip() for entry in entries]
    by_index = any(entry.isdigit() for entry in entries)
    if by_index and order != "PCI_BUS_ID" and len({gpu.name for gpu in gpus}) > 1:
        return Unknown(
            "CUDA numbers GPUs of different models fastest first, which NVML does not tell; set "
            "CUDA_DEVICE_ORDER=PCI_BUS_ID, or name GPUs by UUID in CUDA_VISIBLE_DEVICES"
        )
    found: list[VisibleGpu] = []
    for entry in entries:
        one = _resolve(gpus, entry)
        if one is None:
            break
        if one in found:
            return []
        found.append(one)
    return found


def _resolve(gpus: Sequence[GpuFacts], entry: str) -> VisibleGpu | None:
    if entry.isdigit():
        matching = [gpu for gpu in gpus if gpu.index == int(entry)]
    elif entry.startswith("MIG-GPU-"):
        uuid = entry.removeprefix("MIG-").split("/")[0]
        return next((VisibleGpu(gpu, entry) for gpu in gpus if gpu.uuid == uuid), None)
    elif entry.startswith("MIG-"):
        instances = [VisibleGpu(g, m) for g in gpus for m in g.mig_uuids if m.startswith(entry)]
        return instances[0] if len(instances) == 1 else None
    elif entry.startswith("GPU-"):
        matching = [gpu for gpu in gpus if gpu.uuid.startswith(entry)]
    else:
        return None
    if len(matching) != 1:
        return None
    # A GPU in MIG mode named as a whole: CUDA uses its first instance.
    return VisibleGpu(matching[0], next(iter(matching[0].mig_uuids), ""))


def local_facts(
    rank: int,
    device: torch.device,
    gpus: Sequence[GpuFacts] | Unknown | None = None,
    settings: Settings | None = None,
) -> RankFacts:
    """The facts of this rank, whose tensors are on `device`. Local, no communication.

    Once CUDA runs in this process, torch's UUID of the device is the truth; before that the
    visible-devices variables are read, so that asking does not start CUDA.
    """
    settings = Settings.from_environment() if settings is None else settings
    gpus = probe_gpus() if gpus is None else gpus
    return RankFacts(rank, probe_host(), _find_device(device, gpus, settings))


def _find_device(
    device: torch.device, gpus: Sequence[GpuFacts] | Unknown, settings: Settings
) -> VisibleGpu | Unknown:
    if isinstance(gpus, Unknown):
        return gpus
    if device.type != "cuda":
        return Unknown(f"{device} is not a CUDA device")
    if torch.cuda.is_initialized():
        ordinal = torch.cuda.current_device() if device.index is None else device.index
        uuid = str(torch.cuda.get_device_properties(ordinal).uuid)
        for gpu in gpus:
            if gpu.uuid == f"GPU-{uuid}":
                return VisibleGpu(gpu, next(iter(gpu.mig_uuids), ""))
            if f"MIG-{uuid}" in gpu.mig_uuids:
                return VisibleGpu(gpu, f"MIG-{uuid}")
        return Unknown(f"{device} has the UUID {uuid}, which NVML does not show")
    visible = visible_gpus(gpus, settings.cuda_visible_devices, settings.cuda_device_order)
    if isinstance(visible, Unknown):
        return visible
    ordinal = device.index or 0
    if ordinal >= len(visible):
        return Unknown(f"{device} is not among the {len(visible)} GPUs that CUDA may use here")
    return visible[ordinal]


def decide(facts: Sequence[RankFacts], proofs: Proofs | None = None) -> Verdict:
    """What the facts of all ranks allow. Pure, and the same on every rank.

    Args:
        facts: one for each rank, in rank order.
        proofs: what real copies showed (p2p.probe); None trusts the driver, for every pair.
    """
    host = _decide_host(facts)
    gpus = _decide_gpus(facts)
    if host is not None or gpus is not None:
        missing = host or gpus
        return Verdict(len(facts), host, gpus, missing, missing)
    placed = [fact.device.gpu for fact in facts if isinstance(fact.device, VisibleGpu)]
    p2p = _decide_p2p(placed, proofs)
    return Verdict(len(facts), None, None, p2p, _decide_nvlink(placed))


def _decide_host(facts: Sequence[RankFacts]) -> Refusal | None:
    hosts: dict[str, list[RankFacts]] = {}
    for fact in facts:
        hosts.setdefault(fact.host.boot_id, []).append(fact)
    if len(hosts) == 1:
        return None
    where = "; ".join(
        f"{there[0].host.name} has {_ranks([fact.rank for fact in there])}"
        for there in hosts.values()
    )
    return Refusal(f"the ranks are on {len(hosts)} hosts: {where}")


def _decide_gpus(facts: Sequence[RankFacts]) -> Refusal | None:
    owner: dict[str, int] = {}
    for fact in facts:
        if isinstance(fact.device, Unknown):
            return Unknown(f"the GPU of rank {fact.rank} is not known: {fact.device}")
        if fact.device.mig:
            return Refusal(
                f"rank {fact.rank} is on MIG instance {fact.device.mig}; MIG instances have no "
                "peer access"
            )
        gpu = fact.device.gpu
        if gpu.uuid in owner:
            return Refusal(f"rank {owner[gpu.uuid]} and {fact.rank} are both on {gpu}")
        owner[gpu.uuid] = fact.rank
    return None


def _decide_p2p(gpus: Sequence[GpuFacts], proofs: Proofs | None) -> Refusal | None:
    for accessor in gpus:
        for owner in gpus:
            if accessor is owner:
                continue
            pair = (accessor.uuid, owner.uuid)
            if proofs is not None and pair in proofs:
                failure = proofs[pair]
                if failure is not None:
                    return Refusal(
                        f"GPU {accessor.index} does not reach the memory of GPU {owner.index} in a "
                        f"real copy: {failure}"
                    )
                continue
            claim = accessor.peer(owner.uuid)
            if claim is None or claim.read is None or claim.write is None:
                return Unknown(
                    f"whether GPU {accessor.index} reaches the memory of GPU {owner.index} is "
                    "neither claimed by the driver nor tried"
                )
            if not (claim.read and claim.write):
                verb = "write" if claim.read else "read"
                return Refusal(
                    f"GPU {accessor.index} cannot {verb} the memory of GPU {owner.index}, by the "
                    "driver's own word"
                )
    return None


def _decide_nvlink(gpus: Sequence[GpuFacts]) -> Refusal | None:
    claimed = {
        (a.index, b.index): _linked(a.peer(b.uuid)) for a in gpus for b in gpus if a is not b
    }
    linked = {(a, b) for (a, b), yes in claimed.items() if yes and claimed[b, a]}
    missing = [
        (a.index, b.index) for a, b in combinations(gpus, 2) if (a.index, b.index) not in linked
    ]
    if not missing:
        return None
    a, b = missing[0]
    what = f"{len(gpus)} GPUs without full NVLink"
    if claimed[a, b] is None or claimed[b, a] is None:
        return Unknown(f"{what}: nothing is known of NVLink between GPU {a} and {b}")
    hops = _hops(a, b, linked)
    distance = f"are {hops} hops apart" if hops else "have no NVLink path between them"
    more = f" (and {len(missing) - 1} more pairs)" if len(missing) > 1 else ""
    return Refusal(f"{what}: GPU {a} and {b} {distance}{more}")


def _linked(peer: PeerFacts | None) -> bool | None:
    """Whether NVLink connects a pair: the driver's word, or else the count of links."""
    if peer is None:
        return None
    if peer.nvlink is not None:
        return peer.nvlink
    return None if peer.nvlinks is None else peer.nvlinks > 0


def _hops(start: int, end: int, linked: Set[tuple[int, int]]) -> int:
    """Length of the shortest way over NVLink; 0 when there is none."""
    reached, hops = {start}, 0
    while end not in reached:
        wider = reached | {b for a, b in linked if a in reached}
        if wider == reached:
            return 0
        reached, hops = wider, hops + 1
    return hops


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
