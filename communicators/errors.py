"""What can go wrong, as one hierarchy.

Every message is a sentence that names the rule, what was given and what is accepted, and the rank.
"""

from __future__ import annotations


class CommunicatorError(RuntimeError):
    """Base of every error that this library raises for a failing collective or set-up."""


class CommTimeoutError(CommunicatorError, TimeoutError):
    """A peer did not arrive within the deadline; the message names the late ranks."""


class PeerDiedError(CommTimeoutError):
    """A peer's process is gone. A timeout too, for callers that handle only those."""


class QueueClosedError(CommunicatorError):
    """The queue was closed by its other side or by this one; what was written before was read."""


class CommMismatchError(CommunicatorError):
    """Ranks called with different ops, shapes, dtypes or settings; the message names both."""


class RefusedError(CommunicatorError):
    """A communicator that refused at open was used all the same; the message is its refusal."""


class InvalidArgumentError(CommunicatorError, ValueError):
    """An argument that no communicator accepts: wrong device, dtype, size, rank or dim."""


class SettingsError(CommunicatorError, ValueError):
    """An environment variable with a value that is not accepted."""


class NativeLibraryError(CommunicatorError, ImportError):
    """A native library is missing, of another version, or cannot be loaded."""


class TopologyError(CommunicatorError):
    """World size, ranks or devices that contradict each other."""
