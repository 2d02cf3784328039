"""Fast collectives for tensor-parallel inference. Importing touches no GPU, environment or file."""

from .base import Capability, Communicator, Refusal, Request
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
from .group import Group
from .native import VERSION as __version__
from .settings import Settings

__all__ = [
    "Capability",
    "CommMismatchError",
    "CommTimeoutError",
    "Communicator",
    "CommunicatorError",
    "Group",
    "InvalidArgumentError",
    "NativeLibraryError",
    "PeerDiedError",
    "Refusal",
    "RefusedError",
    "Request",
    "Settings",
    "SettingsError",
    "TopologyError",
    "__version__",
]
