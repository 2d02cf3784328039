"""Opens the communicators of a group on a device, in order of preference, the fallback last."""

from __future__ import annotations

import datetime
import functools
import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from ..backends.torch_distributed import TorchDistributedCommunicator
from ..base import Communicator
from ..errors import SettingsError, TopologyError
from ..groups.group import Group
from ..peer_access.topology import Unknown, VisibleGpu, local_facts, probe_gpus
from ..settings import Settings
from .dispatcher import Dispatcher, table_directories
from .tables import EMPTY, Table, load

if TYPE_CHECKING:
    from collections.abc import Callable

_TORCH_BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl", "hpu": "hccl", "npu": "hccl"}


def torch_backend(device_type: str) -> str:
    """The torch.distributed backend for a kind of device; TopologyError for an unknown kind."""
    if device_type not in _TORCH_BACKENDS:
        raise TopologyError(
            f"device type {device_type!r} is not one of {', '.join(sorted(_TORCH_BACKENDS))}"
        )
    return _TORCH_BACKENDS[device_type]


def new_process_group(
    backend: str, ranks: Sequence[int], name: str, settings: Settings
) -> dist.ProcessGroup:
    """A torch process group over `ranks`, in this order. Collective over them, and only them.

    dist.new_group would sort the ranks, and names a group that only its members make after the
    number of groups that a process has: ranks with different numbers of groups would wait for each
    other at different keys. So the group is made by the function below new_group, with our name.

    Args:
        name: the same on all members, used by no other group of the job.
    """
    members = list(ranks)
    group_name: Any = name  # a GroupName, which is a str by another name
    timeout = datetime.timedelta(seconds=settings.timeout_s)
    process_group, _ = c10d._new_process_group_helper(
        len(members),
        members.index(dist.get_rank()),
        members,
        dist.Backend(backend),
        c10d._get_default_store(),
        group_name=group_name,
        timeout=timeout,
    )
    c10d._world.pg_group_ranks[process_group] = {
        global_rank: rank for rank, global_rank in enumerate(members)
    }
    return process_group


def process_group_over(group: Group, device_type: str) -> dist.ProcessGroup:
    """A torch process group over the ranks of `group`, for a kind of device. Collective over them.

    gloo connects all ranks here; NCCL and the vendors' start later, and on this thread's device.
    Raises PeerDiedError or CommTimeoutError when one of them does not come.
    """
    backend = torch_backend(device_type)
    name = f"{group.name}/{backend}"
    process_group: dist.ProcessGroup = group.attend(
        lambda: new_process_group(backend, group.ranks, name, group.settings),
        f"new_process_group({backend})",
        on_thread=backend == "gloo",
    )
    return process_group


def candidates(
    device_type: str, process_group: dist.ProcessGroup | None = None
) -> list[Callable[[Group, torch.device], Communicator]]:
    """Constructors of the communicators for a kind of device, in order of preference.

    Args:
        process_group: the torch process group that serves the device, for those that use it.
    """
    if device_type == "cpu":
        from ..backends.cpu import CpuCommunicator

        return [CpuCommunicator]
    if device_type == "cuda":
        from ..backends.custom_all_reduce import CustomAllreduce
        from ..backends.nccl.pynccl import PyNcclCommunicator
        from ..backends.quick.quick_all_reduce import QuickAllReduce

        # QuickAllReduce is live only if the user opted in, so it may come first.
        return [QuickAllReduce, CustomAllreduce, PyNcclCommunicator]
    if device_type in ("hpu", "npu", "xpu"):
        from ..backends.hpu import HpuCommunicator
        from ..backends.npu import NpuCommunicator
        from ..backends.xpu import XpuCommunicator

        vendors: dict[str, Callable[..., Communicator]] = {
            "hpu": HpuCommunicator,
            "npu": NpuCommunicator,
            "xpu": XpuCommunicator,
        }
        return [functools.partial(vendors[device_type], process_group=process_group)]
    return []


def machine_shape(group: Group, device: torch.device) -> tuple[str, str]:
    """(product name, link) by which a measured table is found; the same on all ranks.

    The link is "NV<n>" when n NVLinks connect each pair of the group's GPUs, else "". Collective.
    """
    if device.type == "cpu":
        return f"CPU {platform.machine()}", ""
    facts = group.gather_objects("machine shape", local_facts(group.rank, device))
    gpus = [fact.device.gpu for fact in facts if isinstance(fact.device, VisibleGpu)]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if len(gpus) < group.world_size:
        return name, ""
    links = {
        peer.nvlinks if (peer := gpu.peer(other.uuid)) is not None else None
        for gpu in gpus
        for other in gpus
        if gpu is not other
    }
    same = links.pop() if len(links) == 1 else None
    return name, f"NV{same}" if same else ""


def driver_version(device: torch.device) -> str:
    """The GPU driver's version, or the kernel's for a CPU."""
    if device.type == "cuda":
        gpus = probe_gpus()
        return "unknown" if isinstance(gpus, Unknown) or not gpus else gpus[0].driver
    return platform.release()


def machine_table(group: Group, device: torch.device) -> Table:
    """The measured table for this machine shape, or the empty one. Collective.

    Raises SettingsError on all ranks when one of them cannot read its tables.
    """
    name, link = machine_shape(group, device)
    table, problem = EMPTY, None
    try:
        table = load(name, link, group.world_size, table_directories(group.settings.table_dir))
    except SettingsError as error:
        problem = str(error)
    for rank, theirs in enumerate(group.gather_objects("table", problem)):
        if theirs is not None:
            raise SettingsError(f"group {group.name}: the tables of rank {rank}: {theirs}")
    return table


def open_dispatcher(
    group: Group, device: torch.device, process_group: dist.ProcessGroup
) -> Dispatcher:
    """Opens every candidate for `device`, and the fallback last. Collective over the group."""
    table = machine_table(group, device)  # first: if it raises, nothing has been opened
    opened = [construct(group, device) for construct in candidates(device.type, process_group)]
    opened.append(TorchDistributedCommunicator(group, device, process_group))
    return Dispatcher(group, device, opened, table)
