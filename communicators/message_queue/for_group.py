"""Makes a MessageQueue for the ranks of a group: who is local to the writer, and one outcome."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from ..errors import CommunicatorError, InvalidArgumentError, RefusedError
from ..groups.group import Group
from .process import pid_space
from .queue import MessageQueue

if TYPE_CHECKING:
    import torch.distributed as dist


def create_for_group(
    pg: dist.ProcessGroup | Group,
    max_chunk_bytes: int,
    max_chunks: int | None,
    writer_rank: int,
    *,
    connect_ip: str | None,
    timeout: float | None,
) -> MessageQueue:
    """See MessageQueue.create_from_process_group."""
    group = Group.of(pg)
    if not 0 <= writer_rank < group.world_size or group.world_size < 2:
        raise InvalidArgumentError(
            f"create_from_process_group(writer_rank={writer_rank}): a rank of a group of two or "
            f"more is expected, and this one has {group.world_size}"
        )
    spaces = group.gather_objects("message queue: hosts", pid_space(), timeout)
    queue: MessageQueue | None = None
    handle: Any = None
    if group.rank == writer_rank:
        readers = [rank for rank in range(group.world_size) if rank != writer_rank]
        local = [rank for rank in readers if spaces[rank] == spaces[writer_rank]]
        try:
            if len(local) < len(readers) and connect_ip is None:
                connect_ip = address_towards_store(group)
            queue = MessageQueue(
                len(readers),
                len(local),
                local,
                max_chunk_bytes,
                max_chunks,
                connect_ip,
                settings=group.settings,
            )
            handle = queue.export_handle()
        except (CommunicatorError, OSError) as error:
            handle = str(error)
    handle = group.broadcast_object(handle, writer_rank, timeout)
    problem = handle if isinstance(handle, str) else None
    if problem is None and group.rank != writer_rank:
        try:
            queue = MessageQueue.create_from_handle(handle, group.rank, settings=group.settings)
        except (CommunicatorError, OSError) as error:
            problem = str(error)
    problems = group.gather_objects("message queue: joined", problem, timeout)
    for rank, found in enumerate(problems):
        if found is not None:
            if queue is not None:
                queue.close()
            raise RefusedError(f"message queue of group {group.name}: rank {rank}: {found}")
    assert queue is not None
    queue.wait_until_ready(timeout)
    return queue


def address_towards_store(group: Group) -> str:
    """This host's address on the interface that leads to the group's store.

    For the host that runs the store itself it is the address that the store was given, which the
    other hosts can reach.
    """
    store: Any = group.store
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    host = getattr(store, "host", None)
    if host is None:
        raise InvalidArgumentError(
            "message queue: the group spans hosts and its store has no address; pass connect_ip, "
            "an address of the writer's host that the other hosts can reach"
        )
    family, _, _, _, where = socket.getaddrinfo(host, getattr(store, "port", 1))[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(where)  # sends nothing; picks the route
        address: str = probe.getsockname()[0]
    return address
