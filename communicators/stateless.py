"""StatelessProcessGroup: ranks that meet at a TCPStore of their own, without torch.distributed.

For worlds that torch.distributed does not know: an engine and its trainers exchanging weights, two
jobs that join for a while. `torch.distributed.init_process_group` need not be called, and any
number of these groups can exist in a process.
"""

from __future__ import annotations

import datetime
import socket
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from .errors import CommTimeoutError, InvalidArgumentError
from .group import Group
from .settings import Settings


class StatelessProcessGroup(Group):
    """A Group whose store is its own. Made by `create` on every rank.

    Attributes beyond Group's:
        port: where the store listens, also when 0 was asked for on rank 0.
    """

    port: int

    @classmethod
    def create(
        cls,
        host: str,
        port: int,
        rank: int,
        world_size: int,
        *,
        timeout_s: float | None = None,
        settings: Settings | None = None,
    ) -> StatelessProcessGroup:
        """Meets the other ranks at host:port, where rank 0 listens. Returns once all are there.

        Rank 0 binds to `host` alone, not to every interface. Its process hosts the store, so the
        group ends with it.

        Args:
            port: 0 on rank 0 takes a free one; tell the others `group.port`.
            timeout_s: seconds to wait for the others; default: settings.timeout_s.

        Raises CommTimeoutError when rank 0 cannot be reached, or ranks are missing, within that
        time; InvalidArgumentError when rank 0 cannot listen there.
        """
        settings = Settings.from_environment() if settings is None else settings
        deadline = settings.timeout_s if timeout_s is None else timeout_s
        limit = datetime.timedelta(seconds=deadline)
        store: Store
        try:
            if rank == 0:
                listener = _listen(host, port)
                port = listener.getsockname()[1]
                store = TCPStore(
                    host,
                    port,
                    is_master=True,
                    timeout=limit,
                    wait_for_workers=False,
                    master_listen_fd=listener.detach(),  # the store closes it
                )
            else:
                store = TCPStore(host, port, is_master=False, timeout=limit, wait_for_workers=False)
        except dist.DistError as error:
            raise CommTimeoutError(
                f"StatelessProcessGroup: rank {rank} did not reach rank 0 at {host}:{port} within "
                f"{deadline:g} s: {error}"
            ) from error
        group = cls(store, rank, world_size, name="stateless", settings=settings)
        group.port = port
        group.gather_objects("StatelessProcessGroup.create", None, deadline)
        return group

    def close(self, timeout_s: float | None = None) -> None:
        """Says goodbye. Rank 0, whose process hosts the store, waits for the others to do so.

        Needed where rank 0 may end first: without it the others' last call could find no store.
        Raises CommTimeoutError on rank 0 naming the ranks that have not closed.
        """
        if self._forked:
            return  # a child gives nothing back
        if self.rank == 0:
            others = list(range(1, self.world_size))
            if others:
                keys = {rank: f"closed/{rank}" for rank in others}
                self._exchange("close", (), keys, timeout_s)
        else:
            self._exchange("close", [(f"closed/{self.rank}", b"")], {})

    def all_gather_obj(self, obj: Any) -> list[Any]:
        """Every rank's object, in rank order."""
        return self.gather_objects("all_gather_obj", obj)

    def broadcast_obj(self, obj: Any, src: int) -> Any:
        """Rank `src`'s object, on every rank."""
        return self.broadcast_object(obj, src)

    def send_obj(self, obj: Any, dst: int) -> None:
        """Sends a picklable object to rank `dst`."""
        self.send_object(obj, dst)

    def recv_obj(self, src: int) -> Any:
        """The next object from rank `src`."""
        return self.recv_object(src)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise InvalidArgumentError(
            f"StatelessProcessGroup: rank 0 cannot listen on {host}:{port}: {error}"
        ) from error
    return listener
