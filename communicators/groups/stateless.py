"""StatelessProcessGroup: ranks that meet at a TCPStore of their own, without torch.distributed.

For worlds that torch.distributed does not know: an engine and its trainers exchanging weights, two
jobs that join for a while. `torch.distributed.init_process_group` need not be called, and any
number of these groups can exist in a process.
"""

from __future__ import annotations

import datetime
import socket
from typing import Any

from torch.distributed import TCPStore
from torch.distributed.distributed_c10d import Store

from ..errors import InvalidArgumentError
from ..settings import Settings, check_seconds
from .group import Group
from .rendezvous import checked_integer, reach


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
        time; InvalidArgumentError when rank 0 cannot listen there, TopologyError for a rank, world
        size or port that is no such number, PeerDiedError when one came and ended meanwhile.
        """
        settings = Settings.from_environment() if settings is None else settings
        deadline = check_seconds("timeout_s", timeout_s, settings)
        world_size = checked_integer("world_size", world_size, 1)
        rank = checked_integer("rank", rank, 0)
        if rank >= world_size:
            raise InvalidArgumentError(
                f"StatelessProcessGroup.create: rank {rank} is not in 0..{world_size - 1} (world "
                f"size {world_size})"
            )
        if not isinstance(host, str) or not host.strip():
            raise InvalidArgumentError(
                f"StatelessProcessGroup.create(host={host!r}): a host name or an address is "
                f"expected, on rank {rank}"
            )
        port = checked_integer("port", port, 0 if rank == 0 else 1, 65535)
        limit = datetime.timedelta(seconds=deadline)
        options: dict[str, Any] = {}
        if rank == 0:
            listener = _listen(host, port)
            port = listener.getsockname()[1]
            options["master_listen_fd"] = listener.detach()  # the store closes it
        store: Store = reach(
            lambda: TCPStore(
                host, port, is_master=rank == 0, timeout=limit, wait_for_workers=False, **options
            ),
            f"{host}:{port}",
            f"StatelessProcessGroup: rank {rank} of {world_size}, rank 0 of which listens there",
            deadline,
        )
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
    except (OSError, UnicodeError) as error:
        listener.close()
        raise InvalidArgumentError(
            f"StatelessProcessGroup: rank 0 cannot listen on {host}:{port}: {error}"
        ) from error
    return listener
