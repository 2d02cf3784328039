"""Objects from one rank of a group to all others: a MessageQueue for each rank that sends any."""

from __future__ import annotations

from typing import Any

from ..base import Refusal
from ..errors import CommunicatorError, InvalidArgumentError, RefusedError
from ..message_queue.queue import MessageQueue
from . import objects
from .group import Group


class ObjectBroadcaster:
    """broadcast_object of one group.

    A queue is made at the first broadcast from its rank: that call is collective, so the making is
    too. If the ranks cannot share a queue, the group's store carries the objects, some 20 times
    slower; explain() then says why.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._queues: dict[int, MessageQueue | Refusal] = {}

    def broadcast(self, obj: Any, src: int) -> Any:
        """Rank `src`'s picklable object, on every rank. Collective.

        If it cannot be pickled, `src` raises InvalidArgumentError; the others raise the same or get
        a Refused. A rank that cannot unpickle it raises CommunicatorError, by itself.
        """
        queue = self._queues.get(src)
        if queue is None:
            queue = self._queues[src] = self._open(src)
        if isinstance(queue, Refusal):
            return self._group.broadcast_object(obj, src)
        if src == self._group.rank:
            return self._send(queue, obj)
        try:
            return queue.dequeue()
        except CommunicatorError as error:
            if type(error) is not CommunicatorError:
                raise
            sentence = objects.cannot_unpickle("broadcast_object", f"rank {src}", error)
            raise CommunicatorError(sentence) from error

    def _send(self, queue: MessageQueue, obj: Any) -> Any:
        try:
            queue.enqueue(obj)
        except InvalidArgumentError as error:  # nothing was sent, and the readers wait
            rank, cause = self._group.rank, error.__cause__ or error
            text = objects.cannot_pickle("broadcast_object(obj)", obj, cause, rank)
            queue.enqueue(objects.Refused(text))
            raise InvalidArgumentError(text) from cause
        return obj

    def _open(self, src: int) -> MessageQueue | Refusal:
        try:
            return MessageQueue.create_from_process_group(self._group, writer_rank=src)
        except RefusedError as error:  # of all ranks, with one reason
            return Refusal(str(error))

    def explain(self) -> str:
        """What carries objects; queues are made when first used."""
        lines = ["  broadcast_object: message_queue, made at the first broadcast from a rank"]
        lines += [
            f"    from rank {src}: the store, because {queue}"
            for src, queue in sorted(self._queues.items())
            if isinstance(queue, Refusal)
        ]
        return "\n".join(lines)

    def close(self) -> None:
        """Closes the queues; idempotent, no communication."""
        for queue in self._queues.values():
            if isinstance(queue, MessageQueue):
                queue.close()
        self._queues.clear()
