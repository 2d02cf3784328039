"""Fast collectives for tensor-parallel inference.

Importing touches no GPU, no environment variable and no file, and not even torch: the names below
are brought in when they are first used, so that `communicators doctor` can say what is missing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # what type checkers see; at run time __getattr__ imports on first use
    from .backends.cpu import CpuCommunicator
    from .backends.custom_all_reduce import CustomAllreduce
    from .backends.hpu import HpuCommunicator
    from .backends.mscclpp.pymscclpp import PyMscclppCommunicator
    from .backends.nccl.pynccl import PyNcclCommunicator
    from .backends.npu import NpuCommunicator
    from .backends.quick.quick_all_reduce import QuickAllReduce
    from .backends.torch_distributed import TorchDistributedCommunicator
    from .backends.xpu import XpuCommunicator
    from .base import Capability, Communicator, Refusal, Request
    from .bindings.pynccl_allocator import use_symmetric_memory
    from .errors import (
        CommMismatchError,
        CommTimeoutError,
        CommunicatorError,
        InvalidArgumentError,
        NativeLibraryError,
        PeerDiedError,
        RefusedError,
        SettingsError,
        TopologyError,
    )
    from .groups.coordinator import GroupCoordinator
    from .groups.group import Group
    from .groups.stateless import StatelessProcessGroup
    from .message_queue.queue import MessageQueue
    from .parallel_state import (
        destroy_distributed_environment,
        destroy_model_parallel,
        get_pp_group,
        get_tp_group,
        get_world_group,
        graph_capture,
        init_distributed_environment,
        initialize_model_parallel,
        tensor_model_parallel_all_gather,
        tensor_model_parallel_all_reduce,
        tensor_model_parallel_gather,
        tensor_model_parallel_reduce_scatter,
    )
    from .settings import Settings

_HOMES = {
    "base": ("Capability", "Communicator", "Refusal", "Request"),
    "errors": (
        "CommMismatchError",
        "CommTimeoutError",
        "CommunicatorError",
        "InvalidArgumentError",
        "NativeLibraryError",
        "PeerDiedError",
        "RefusedError",
        "SettingsError",
        "TopologyError",
    ),
    "groups.group": ("Group",),
    "groups.coordinator": ("GroupCoordinator",),
    "settings": ("Settings",),
    "backends.cpu": ("CpuCommunicator",),
    "backends.custom_all_reduce": ("CustomAllreduce",),
    "backends.hpu": ("HpuCommunicator",),
    "backends.npu": ("NpuCommunicator",),
    "backends.nccl.pynccl": ("PyNcclCommunicator",),
    "backends.mscclpp.pymscclpp": ("PyMscclppCommunicator",),
    "backends.quick.quick_all_reduce": ("QuickAllReduce",),
    "backends.torch_distributed": ("TorchDistributedCommunicator",),
    "backends.xpu": ("XpuCommunicator",),
    "message_queue.queue": ("MessageQueue",),
    "groups.stateless": ("StatelessProcessGroup",),
    "bindings.pynccl_allocator": ("use_symmetric_memory",),
    "parallel_state": (
        "destroy_distributed_environment",
        "destroy_model_parallel",
        "get_pp_group",
        "get_tp_group",
        "get_world_group",
        "graph_capture",
        "init_distributed_environment",
        "initialize_model_parallel",
        "tensor_model_parallel_all_gather",
        "tensor_model_parallel_all_reduce",
        "tensor_model_parallel_gather",
        "tensor_model_parallel_reduce_scatter",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

# Spelled out, since type checkers read no more.
__all__ = [
    "Capability",
    "CommMismatchError",
    "CommTimeoutError",
    "Communicator",
    "CommunicatorError",
    "CpuCommunicator",
    "CustomAllreduce",
    "Group",
    "GroupCoordinator",
    "HpuCommunicator",
    "InvalidArgumentError",
    "MessageQueue",
    "NativeLibraryError",
    "NpuCommunicator",
    "PeerDiedError",
    "PyMscclppCommunicator",
    "PyNcclCommunicator",
    "QuickAllReduce",
    "Refusal",
    "RefusedError",
    "Request",
    "Settings",
    "SettingsError",
    "StatelessProcessGroup",
    "TopologyError",
    "TorchDistributedCommunicator",
    "XpuCommunicator",
    "__version__",
    "destroy_distributed_environment",
    "destroy_model_parallel",
    "get_pp_group",
    "get_tp_group",
    "get_world_group",
    "graph_capture",
    "init_distributed_environment",
    "initialize_model_parallel",
    "load",
    "tensor_model_parallel_all_gather",
    "tensor_model_parallel_all_reduce",
    "tensor_model_parallel_gather",
    "tensor_model_parallel_reduce_scatter",
    "use_symmetric_memory",
]


def load() -> None:
    """Loads the native libraries, so that `torch.ops.communicators` has its operators.

    Everything here does so when it needs them. This is for callers of the operators alone.
    NativeLibraryError says why it cannot be done.
    """
    importlib.import_module(".bindings.native", __name__).load_ops()


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
