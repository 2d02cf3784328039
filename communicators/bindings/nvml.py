"""What NVML says about the GPUs of this host, through `pynvml` (the package nvidia-ml-py).

Facts only; topology.py decides on them. NVML needs no CUDA context, sees the GPUs whatever
CUDA_VISIBLE_DEVICES says, and may be absent (no NVIDIA driver, a stripped container): then the
answer is an `Unknown` with the reason.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from ..base import Refusal

_P = ParamSpec("_P")
_R = TypeVar("_R")

# nvmlGpuP2PCapsIndex_t. By number: pynvml's own NVML_P2P_CAPS_INDEX_READ is a tuple by mistake.
_CAPS_READ, _CAPS_WRITE, _CAPS_NVLINK = 0, 1, 2
_P2P_OK = 0
_REMOTE_GPU, _REMOTE_SWITCH = 0, 2  # nvmlIntNvLinkDeviceType_t

# nvmlGpuTopologyLevel_t, in the words of `nvidia-smi topo -m`.
_PATHS = {0: "same board", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}


@dataclass(frozen=True)
class Unknown(Refusal):
    """A fact that could not be found out, and why. A Refusal for whoever needs the fact."""


@dataclass(frozen=True)
class PeerFacts:
    """What is claimed of the way from one GPU to another. None stands for "not known"."""

    uuid: str
    nvlinks: int | None = None  # active NVLinks to it, direct ones or by way of NVSwitch
    nvlink: bool | None = None  # the driver says that peer access goes over NVLink
    read: bool | None = None  # the driver says that its memory can be read
    write: bool | None = None  # ... and written
    path: str = ""  # over PCIe: PIX, PXB, PHB, NODE or SYS


@dataclass(frozen=True)
class GpuFacts:
    """One physical GPU. `index` is NVML's (PCI order), which need not be CUDA's ordinal."""

    index: int
    uuid: str
    name: str
    pci_bus_id: str
    driver: str
    capability: tuple[int, int] = (0, 0)
    peers: tuple[PeerFacts, ...] = ()
    mig_uuids: tuple[str, ...] = ()  # its MIG instances; empty when MIG is off

    def peer(self, uuid: str) -> PeerFacts | None:
        """What is claimed of the way to the GPU `uuid`; None for a GPU that NVML did not show."""
        return next((peer for peer in self.peers if peer.uuid == uuid), None)

    def __str__(self) -> str:
        return f"GPU {self.index} ({self.name}, {self.uuid})"


def _pynvml() -> Any:
    return importlib.import_module("pynvml")


def with_nvml_context(fn: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorator: NVML is initialised before the call and shut down after it, whatever happens.

    NVML counts initialisations, so calls may nest. Raises ImportError without pynvml and
    pynvml.NVMLError where NVML cannot start.
    """

    @functools.wraps(fn)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        nvml = _pynvml()
        nvml.nvmlInit()
        try:
            return fn(*args, **kwargs)
        finally:
            nvml.nvmlShutdown()

    return wrapper


def read_gpus(nvml: Any = None) -> list[GpuFacts] | Unknown:
    """All GPUs that NVML shows on this host, in its order, each with its claims about the others.

    Args:
        nvml: a module with pynvml's functions; default: pynvml itself, imported now.
    """
    if nvml is None:
        try:
            nvml = _pynvml()
        except ImportError as error:
            return Unknown(f"NVML cannot be asked without the package nvidia-ml-py: {error}")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return Unknown(f"NVML does not start: {error}")
    try:
        return _read(nvml)
    except nvml.NVMLError as error:
        return Unknown(f"NVML failed while the GPUs were listed: {error}")
    finally:
        nvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _ask(nvml: Any, call: str, *args: Any) -> Any:
    """The call's answer, or None where this GPU or driver does not support the question."""
    try:
        return getattr(nvml, call)(*args)
    except nvml.NVMLError:
        return None


def _read(nvml: Any) -> list[GpuFacts]:
    driver = _text(nvml.nvmlSystemGetDriverVersion())
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    uuids = [_text(nvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    buses = [_text(nvml.nvmlDeviceGetPciInfo(handle).busId).lower() for handle in handles]
    links = [_links(nvml, handle) for handle in handles]

    def facts(mine: int) -> GpuFacts:
        handle = handles[mine]
        peers = []
        for other in range(len(handles)):
            if other == mine:
                continue
            nvlink, read, write = (
                None if status is None else status == _P2P_OK
                for status in (
                    _ask(nvml, "nvmlDeviceGetP2PStatus", handle, handles[other], index)
                    for index in (_CAPS_NVLINK, _CAPS_READ, _CAPS_WRITE)
                )
            )
            level = _ask(nvml, "nvmlDeviceGetTopologyCommonAncestor", handle, handles[other])
            count = _count(links[mine], links[other], buses[other])
            path = _PATHS.get(level, "")
            peers.append(PeerFacts(uuids[other], count, nvlink, read, write, path))
        return GpuFacts(
            index=mine,
            uuid=uuids[mine],
            name=_text(nvml.nvmlDeviceGetName(handle)),
            pci_bus_id=buses[mine],
            driver=driver,
            capability=tuple(_ask(nvml, "nvmlDeviceGetCudaComputeCapability", handle) or (0, 0)),
            peers=tuple(peers),
            mig_uuids=_mig_uuids(nvml, handle),
        )

    return [facts(index) for index in range(len(handles))]


def _links(nvml: Any, handle: Any) -> list[tuple[int, str]] | None:
    """(type of the far end, its PCI bus id) of every active NVLink; None if NVML cannot tell."""
    found: list[tuple[int, str]] = []
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            if not nvml.nvmlDeviceGetNvLinkState(handle, link):
                continue
        except nvml.NVMLError:
            if link == 0:  # a GPU without NVLink answers "not supported" for the first one
                return []
            break  # past its last link
        remote = _ask(nvml, "nvmlDeviceGetNvLinkRemotePciInfo", handle, link)
        kind = _ask(nvml, "nvmlDeviceGetNvLinkRemoteDeviceType", handle, link)
        if remote is None or kind is None:
            return None
        found.append((kind, _text(remote.busId).lower()))
    return found


def _count(
    mine: list[tuple[int, str]] | None, theirs: list[tuple[int, str]] | None, bus: str
) -> int | None:
    """NVLinks between two GPUs: the direct ones, and as many as both have into the switches."""
    if mine is None or theirs is None:
        return None
    direct = sum(1 for kind, remote in mine if kind == _REMOTE_GPU and remote == bus)
    switched = [sum(1 for kind, _ in side if kind == _REMOTE_SWITCH) for side in (mine, theirs)]
    return direct + min(switched)


def _mig_uuids(nvml: Any, handle: Any) -> tuple[str, ...]:
    mode = _ask(nvml, "nvmlDeviceGetMigMode", handle)
    if mode is None or not mode[0]:
        return ()
    instances = (
        _ask(nvml, "nvmlDeviceGetMigDeviceHandleByIndex", handle, index)
        for index in range(_ask(nvml, "nvmlDeviceGetMaxMigDeviceCount", handle) or 0)
    )
    return tuple(_text(nvml.nvmlDeviceGetUUID(one)) for one in instances if one is not None)


@with_nvml_context
def is_full_nvlink(physical_device_ids: list[int], world_size: int) -> bool:
    """True when each of these GPUs reaches each other one over NVLink, as NVML claims it.

    Args:
        physical_device_ids: NVML indices, one per rank.
        world_size: number of ranks; with one rank there is nothing to link, and the answer is True.
    Raises ImportError without pynvml, pynvml.NVMLError without NVML or for a wrong index.
    """
    nvml = _pynvml()
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in physical_device_ids[:world_size]]
    return all(
        _ask(nvml, "nvmlDeviceGetP2PStatus", a, b, _CAPS_NVLINK) == _P2P_OK
        for i, a in enumerate(handles)
        for b in handles[i + 1 :]
    )
