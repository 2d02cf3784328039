"""Fast collectives for tensor-parallel inference.

Importing touches no GPU, no environment variable and no file, and not even torch: the names below
are brought in when they are first used, so that `communicators doctor` can say what is missing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # what type checkers see; at run time __getattr__ imports on first use
    from .backends.cpu import (
        CpuCommunicator as CpuCommunicator,
    )
    from .backends.custom_all_reduce import (
        CustomAllreduce as CustomAllreduce,
    )
    from .backends.hpu import (
        HpuCommunicator as HpuCommunicator,
    )
    from .backends.npu import (
        NpuCommunicator as NpuCommunicator,
    )
    from .backends.pymscclpp import (
        PyMscclppCommunicator as PyMscclppCommunicator,
    )
    from .backends.pynccl import (
        PyNcclCommunicator as PyNcclCommunicator,
    )
    from .backends.quick_all_reduce import (
        QuickAllReduce as QuickAllReduce,
    )
    from .backends.torch_distributed import (
        TorchDistributedCommunicator as TorchDistributedCommunicator,
    )
    from .backends.xpu import (
        XpuCommunicator as XpuCommunicator,
    )
    from .base import (
        Capability as Capability,
    )
    from .base import (
        Communicator as Communicator,
    )
    from .base import (
        Refusal as Refusal,
    )
    from .base import (
        Request as Request,
    )
    from .bindings.pynccl_allocator import (
        use_symmetric_memory as use_symmetric_memory,
    )
    from .errors import (
        CommMismatchError as CommMismatchError,
    )
    from .errors import (
        CommTimeoutError as CommTimeoutError,
    )
    from .errors import (
        CommunicatorError as CommunicatorError,
    )
    from .errors import (
        InvalidArgumentError as InvalidArgumentError,
    )
    from .errors import (
        NativeLibraryError as NativeLibraryError,
    )
    from .errors import (
        PeerDiedError as PeerDiedError,
    )
    from .errors import (
        RefusedError as RefusedError,
    )
    from .errors import (
        SettingsError as SettingsError,
    )
    from .errors import (
        TopologyError as TopologyError,
    )
    from .group import (
        Group as Group,
    )
    from .group_coordinator import (
        GroupCoordinator as GroupCoordinator,
    )
    from .parallel_state import (
        destroy_distributed_environment as destroy_distributed_environment,
    )
    from .parallel_state import (
        destroy_model_parallel as destroy_model_parallel,
    )
    from .parallel_state import (
        get_pp_group as get_pp_group,
    )
    from .parallel_state import (
        get_tp_group as get_tp_group,
    )
    from .parallel_state import (
        get_world_group as get_world_group,
    )
    from .parallel_state import (
        graph_capture as graph_capture,
    )
    from .parallel_state import (
        init_distributed_environment as init_distributed_environment,
    )
    from .parallel_state import (
        initialize_model_parallel as initialize_model_parallel,
    )
    from .parallel_state import (
        tensor_model_parallel_all_gather as tensor_model_parallel_all_gather,
    )
    from .parallel_state import (
        tensor_model_parallel_all_reduce as tensor_model_parallel_all_reduce,
    )
    from .parallel_state import (
        tensor_model_parallel_gather as tensor_model_parallel_gather,
    )
    from .parallel_state import (
        tensor_model_parallel_reduce_scatter as tensor_model_parallel_reduce_scatter,
    )
    from .settings import (
        Settings as Settings,
    )
    from .shm_broadcast import (
        MessageQueue as MessageQueue,
    )
    from .stateless import (
        StatelessProcessGroup as StatelessProcessGroup,
    )

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
    "group": ("Group",),
    "group_coordinator": ("GroupCoordinator",),
    "settings": ("Settings",),
    "backends.cpu": ("CpuCommunicator",),
    "backends.custom_all_reduce": ("CustomAllreduce",),
    "backends.hpu": ("HpuCommunicator",),
    "backends.npu": ("NpuCommunicator",),
    "backends.pynccl": ("PyNcclCommunicator",),
    "backends.pymscclpp": ("PyMscclppCommunicator",),
    "backends.quick_all_reduce": ("QuickAllReduce",),
    "backends.torch_distributed": ("TorchDistributedCommunicator",),
    "backends.xpu": ("XpuCommunicator",),
    "shm_broadcast": ("MessageQueue",),
    "stateless": ("StatelessProcessGroup",),
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

__all__ = ["__version__", "load", *sorted(_HOME_OF)]


def load() -> None:
    """Loads the native libraries, so that `torch.ops.communicators` has its operators.

    Everything here does so when it needs them. This is for callers of the operators alone.
    NativeLibraryError says why it cannot be done.
    """
    importlib.import_module(".native", __name__).load_ops()


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
