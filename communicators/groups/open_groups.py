"""The open groups of this process, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import CommunicatorError
from . import forks

if TYPE_CHECKING:
    from .coordinator import GroupCoordinator

#: By name, "world", "tp", "pp" and the user's own.
OPEN_GROUPS: dict[str, GroupCoordinator] = {}


def _after_fork() -> None:
    """In the child, which may open groups of its own."""
    for group in OPEN_GROUPS.values():
        group.after_fork()
    OPEN_GROUPS.clear()


forks.call_in_child(_after_fork)


def open_group(name: str) -> GroupCoordinator:
    """The open group `name` that this rank is in; CommunicatorError when there is none."""
    try:
        return OPEN_GROUPS[name]
    except KeyError:
        raise CommunicatorError(
            f"this rank has no open group {name!r}; open are: {', '.join(OPEN_GROUPS) or 'none'} "
            "(init_distributed_environment and initialize_model_parallel open groups)"
        ) from None
