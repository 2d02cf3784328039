"""What a GroupCoordinator does with objects and with dicts of tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InvalidArgumentError
from .arguments import check_mapping, check_peer, check_root
from .collectives import Collectives
from .objects import Refused
from .tensor_dict import Packed, TensorLike, as_bytes, pack, receive

if TYPE_CHECKING:
    from .object_broadcast import ObjectBroadcaster


class GroupObjects(Collectives):
    """The part of GroupCoordinator that moves objects; the tensors in them go by Collectives.

    Whatever is refused, on whichever rank, the ranks are in step afterwards.
    """

    _objects: ObjectBroadcaster

    def broadcast_object(self, obj: Any = None, src: int = 0) -> Any:
        """Rank `src`'s picklable object, on every rank.

        If it cannot be pickled, all ranks raise the same InvalidArgumentError; a rank that cannot
        unpickle it raises CommunicatorError. The ranks are in step after either.
        """
        check_root("broadcast_object", "src", src, self.world_size, self.rank_in_group)
        if self.world_size == 1:
            return obj
        return self._broadcast_message("broadcast_object", None, obj, src)

    def broadcast_object_list(self, objects: list[Any], src: int = 0) -> list[Any]:
        """Overwrites `objects` with rank `src`'s list, of the same length; returns it.

        Errors as broadcast_object; a rank with a list of another length raises by itself.
        """
        check_root("broadcast_object_list", "src", src, self.world_size, self.rank_in_group)
        wrong = None
        if not isinstance(objects, list):
            wrong = (
                f"broadcast_object_list(objects): a list is expected on rank {self.rank_in_group}, "
                f"and a {type(objects).__name__} was given"
            )
        sends = self.rank_in_group == src
        theirs = self.broadcast_object(Refused(wrong) if wrong and sends else objects, src)
        if wrong is not None:
            raise InvalidArgumentError(wrong)
        if not isinstance(theirs, list) or len(theirs) != len(objects):
            given = f"{len(theirs)}" if isinstance(theirs, list) else f"a {type(theirs).__name__}"
            raise InvalidArgumentError(
                f"broadcast_object_list: rank {self.rank_in_group} passes {len(objects)} objects "
                f"and rank {src} {given}"
            )
        objects[:] = theirs
        return objects

    def send_object(self, obj: Any, dst: int) -> None:
        """Sends a picklable object to rank `dst` of the group.

        InvalidArgumentError, with nothing sent, if it cannot be pickled.
        """
        self.group.send_object(obj, dst)

    def recv_object(self, src: int) -> Any:
        """The next object that rank `src` of the group sent here.

        CommunicatorError if it cannot be unpickled here, CommMismatchError if it is a dict of
        send_tensor_dict: it is used up then, and the next one can be received.
        """
        return self._recv_message("recv_object", None, src)

    def broadcast_tensor_dict(self, tensors: Mapping[str, Any] | None = None, src: int = 0) -> Any:
        """Rank `src`'s dict of tensors and other values, on every rank.

        Tensors on the group's device arrive on the receiver's own; host tensors stay in host
        memory. The dict is of any kind, and tensors may be anywhere in it. On `src` the given dict
        itself is returned. Before anything travels the whole dict is checked: if a part of it
        cannot be sent, all ranks raise the same InvalidArgumentError and are in step.
        """
        check_root("broadcast_tensor_dict", "src", src, self.world_size, self.rank_in_group)
        call = "broadcast_tensor_dict"
        if self.rank_in_group != src:
            return self._broadcast_message(call, "tensor dict", None, src)
        if self.world_size == 1:
            check_mapping(call, tensors, self.rank_in_group)
            return tensors
        try:
            message, parts = self._packed(call, tensors)
        except InvalidArgumentError as error:
            # The others wait for this rank: they are told.
            self._objects.broadcast(Refused(str(error)), src)
            raise
        self._objects.broadcast(message, src)
        for part in parts:
            self.broadcast(part, src)
        return tensors

    def send_tensor_dict(self, tensors: Mapping[str, Any], dst: int | None = None) -> None:
        """Sends a dict of tensors and other values to rank `dst` (default: the next one).

        InvalidArgumentError, with nothing sent, if a part of it cannot travel.
        """
        dst = (self.rank_in_group + 1) % self.world_size if dst is None else dst
        check_peer("send_tensor_dict", "dst", dst, self.rank_in_group, self.world_size)
        message, parts = self._packed("send_tensor_dict", tensors)
        self.send_object(message, dst)
        for part in parts:
            self.send(part, dst)

    def recv_tensor_dict(self, src: int | None = None) -> Any:
        """The next dict that rank `src` (default: the previous one) sent here.

        CommMismatchError if it sent an object, CommunicatorError if a value cannot be unpickled
        here: what came is used up, and the next dict can be received.
        """
        src = (self.rank_in_group - 1) % self.world_size if src is None else src
        check_peer("recv_tensor_dict", "src", src, self.rank_in_group, self.world_size)
        return self._recv_message("recv_tensor_dict", "tensor dict", src)

    def _packed(self, call: str, tensors: Any) -> tuple[Packed, Iterator[torch.Tensor]]:
        """What tensor_dict.pack says, the tensors as bytes where they travel from, one by one."""
        check_mapping(call, tensors, self.rank_in_group)
        devices = {"cpu", self.device.type}
        packed, parts = pack(
            f"{call}(tensors)", "tensor dict", tensors, devices, self.rank_in_group
        )
        pairs = zip(packed.likes, parts, strict=True)
        return packed, (as_bytes(part.to(like.device_for(self.device))) for like, part in pairs)

    def _broadcast_message(self, call: str, kind: str | None, obj: Any, src: int) -> Any:
        message = self._objects.broadcast(obj, src)
        if self.rank_in_group == src:
            return message

        def receive_part(like: TensorLike) -> torch.Tensor:
            x = like.empty(self.device)
            self.broadcast(as_bytes(x), src)
            return x

        return receive(call, kind, message, receive_part, f"rank {src}")

    def _recv_message(self, call: str, kind: str | None, src: int) -> Any:
        message = self.group.recv_object(src)

        def receive_part(like: TensorLike) -> torch.Tensor:
            nbytes = math.prod(like.shape) * like.dtype.itemsize
            raw = self.recv([nbytes], torch.uint8, src, like.device_for(self.device))
            return raw.view(like.dtype).view(like.shape)

        return receive(call, kind, message, receive_part, f"rank {src}")
