"""What a forked child inherits and must not use: the objects here are told of it in the child.

The ranks of a job are its processes. A child that goes on with its parent's sockets, memory or
turns in a collective is taken for the parent by the peers, so it may not, and may give nothing
back either. Nothing is asked on the way of a call: the objects are changed once, in the child.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable
from typing import Any, Protocol


class Inherited(Protocol):
    def after_fork(self) -> None:
        """In the child: become unusable, and forget what close() would give back."""


_objects: weakref.WeakSet[Inherited] = weakref.WeakSet()
_hooks: list[Callable[[], None]] = []
parent = 0  # the process that this one was forked from, if it had imported the library


def tell(inherited: Inherited) -> None:
    """`inherited.after_fork()` will be called in every child that is forked from now on."""
    _objects.add(inherited)


def call_in_child(hook: Callable[[], None]) -> None:
    """The same for the state of a module."""
    _hooks.append(hook)


def keep(*objects: Any) -> None:
    """Never destroys `objects`: their C++ would wait for threads that the child does not have."""
    for one in objects:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(one))


def sentence(what: str, rank: int) -> str:
    """Why a child may not use `what`, which is its parent's."""
    return (
        f"{what} belongs to process {parent}, rank {rank}, and this is its forked child "
        f"{os.getpid()}; a child opens groups of its own under another rendezvous"
    )


def _after_fork_in_child() -> None:
    global parent
    parent = os.getppid()
    for hook in _hooks:
        hook()
    for inherited in list(_objects):
        inherited.after_fork()
    _objects.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
