"""Every channel for objects with values that are awkward to pickle: they arrive as they were, or
are refused before anything has moved, and the channel goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from communicators import CommMismatchError, CommunicatorError, InvalidArgumentError, Settings
from communicators import shm as shm_calls
from communicators.base import Refusal
from communicators.groups.coordinator import GroupCoordinator
from communicators.groups.stateless import StatelessProcessGroup
from tests.ranks import Rank, pool, run_fresh
from tests.unit.awkward import OBJECTS, REFUSED, SLOW_TO_MAKE, TENSORS, Poison, same
from tests.unit.test_group_coordinator import world_of
from tests.unit.test_shm_collectives import communicator

ROUND_TRIPS = TENSORS | OBJECTS
SETTINGS = Settings(timeout_s=30.0)


Call = Callable[[Any], Any]


class Ends:
    """send(value) on rank 0, receive() on rank 1; a collective is both, and every rank raises."""

    def __init__(self, send: Call, receive: Call | None = None, wrap: bool = False) -> None:
        self.send = send
        self.collective = receive is None
        self.receive = receive if receive is not None else send
        self.wrap = wrap

    def wrapped(self, value: Any) -> Any:
        """What goes by a channel for dicts alone: the value in one."""
        return {"value": value, "n": 1} if self.wrap else value


def group_ends(rank: Rank, name: str) -> tuple[Ends, Any]:
    kind, call = name.split(".")
    if kind == "Stateless":
        stateless = StatelessProcessGroup(rank.store(), rank.rank, 2, name=name, settings=SETTINGS)
        ends = {
            "send_obj": Ends(lambda v: stateless.send_obj(v, 1), lambda _: stateless.recv_obj(0)),
            "all_gather_obj": Ends(lambda v: stateless.all_gather_obj(v)[0]),
            "broadcast_obj": Ends(lambda v: stateless.broadcast_obj(v, 0)),
        }
        return ends[call], stateless
    group = rank.group(name, timeout_s=30.0)
    ends = {
        "send_object": Ends(lambda v: group.send_object(v, 1), lambda _: group.recv_object(0)),
        "gather_objects": Ends(lambda v: group.gather_objects("test", v)[0]),
        "broadcast_object": Ends(lambda v: group.broadcast_object(v, 0)),
    }
    return ends[call], group


def shm_ends(rank: Rank, name: str) -> Ends:
    cpu = communicator(rank)
    return {
        "shm.send_object": Ends(
            lambda v: shm_calls.send_object(cpu._handle, v, 1),
            lambda _: shm_calls.recv_object(cpu._handle, 0),
        ),
        "CpuCommunicator.send_tensor_dict": Ends(
            lambda v: cpu.send_tensor_dict(v, 1), lambda _: cpu.recv_tensor_dict(0), wrap=True
        ),
    }[name]


def world_ends(world: GroupCoordinator, name: str) -> Ends:
    return {
        "send_object": Ends(lambda v: world.send_object(v, 1), lambda _: world.recv_object(0)),
        "broadcast_object": Ends(lambda v: world.broadcast_object(v, 0)),
        "broadcast_object_list": Ends(lambda v: world.broadcast_object_list([v, 1], 0)[0]),
        "send_tensor_dict": Ends(
            lambda v: world.send_tensor_dict(v, 1), lambda _: world.recv_tensor_dict(0), wrap=True
        ),
        "broadcast_tensor_dict": Ends(lambda v: world.broadcast_tensor_dict(v, 0), wrap=True),
    }[name]


def check_ends(rank: Rank, ends: Ends) -> None:
    """Rank 0 gives, rank 1 gets; in a collective rank 1 passes None."""
    gives = rank.rank == 0
    call = ends.send if gives else ends.receive

    def give(value: Any) -> Any:
        try:
            return call(ends.wrapped(value) if gives else None)
        except CommunicatorError as error:
            return error

    def goes_on(number: int) -> None:
        got = give(number)
        assert gives or same(got, ends.wrapped(number)), got

    for name in sorted(ROUND_TRIPS.keys() - SLOW_TO_MAKE):
        value = ROUND_TRIPS[name]()
        got = give(value)
        assert not isinstance(got, CommunicatorError), (name, got)
        assert gives or same(got, ends.wrapped(ROUND_TRIPS[name]())), (name, got)
    for number, name in enumerate(sorted(REFUSED.keys() - SLOW_TO_MAKE)):
        if gives or ends.collective:
            found = give(REFUSED[name]())
            assert type(found) is InvalidArgumentError, (name, found)
            assert "cannot be pickled" in str(found), (name, found)
        goes_on(number)
    for number in range(2):
        found = give([torch.ones(3), Poison()])
        if not gives:
            assert type(found) is CommunicatorError, found
            assert "rank 0" in str(found) and "boom" in str(found)
        goes_on(number)
    for exit in (SystemExit, GeneratorExit):  # no Exception: as it is, and used up all the same
        try:
            call(ends.wrapped([torch.ones(3), Poison(exit)]) if gives else None)
            assert gives
        except exit:
            assert not gives
        goes_on(3)


def on_group(rank: Rank, name: str) -> None:
    ends, group = group_ends(rank, name)
    group.barrier()
    before = group.store.num_keys()
    check_ends(rank, ends)
    group.barrier()
    # Each rank's key of the last barrier, and of the one before where a rank is still in it.
    assert group.store.num_keys() <= before + 2, "messages are left in the store"


@pytest.mark.parametrize(
    "name",
    [
        "Group.send_object", "Group.gather_objects", "Group.broadcast_object",
        "Stateless.send_obj", "Stateless.all_gather_obj", "Stateless.broadcast_obj",
    ],
)  # fmt: skip
def test_over_the_store(name: str) -> None:
    pool(2).run(on_group, name)


def on_shm(rank: Rank, name: str) -> None:
    check_ends(rank, shm_ends(rank, name))
    x = torch.ones(3)
    assert torch.equal(communicator(rank).all_reduce(x), 2 * x)


@pytest.mark.parametrize("name", ["shm.send_object", "CpuCommunicator.send_tensor_dict"])
def test_over_shared_memory(name: str) -> None:
    pool(2).run(on_shm, name)


def on_world(rank: Rank, names: list[str], carrier: str) -> None:
    with world_of(rank, f"objects {names} {carrier}") as world:
        if carrier == "store":
            world._objects._queues[0] = Refusal("a test")
        for name in names:
            check_ends(rank, world_ends(world, name))
            x = torch.ones(3)
            assert torch.equal(world.all_reduce(x), 2 * x), "still in step"


BROADCASTS = ["broadcast_object", "broadcast_object_list", "broadcast_tensor_dict"]


@pytest.mark.parametrize(
    ("names", "carrier"),
    [
        (["send_object", "send_tensor_dict"], "store"),
        (BROADCASTS, "queue"),
        (BROADCASTS, "store"),
    ],
    ids=["one to one", "broadcasts by a queue", "broadcasts by the store"],
)
def test_of_a_coordinator(names: list[str], carrier: str) -> None:
    pool(2).run(on_world, names, carrier)


# -- what was sent and what is received -----------------------------------------------------------


def other_kinds(rank: Rank) -> None:
    """Rank 1 asks for something else than rank 0 sent; it is used up, with its tensors."""
    tensors = [torch.ones(3), torch.empty(0)]
    many = {"a": torch.arange(100_000), "b": tensors, "c": "x"}
    with world_of(rank, "other kinds") as world:
        cpu = communicator(rank)
        sends = [
            lambda: world.send_object({"x": 1}, 1), lambda: world.send_tensor_dict(many, 1),
            lambda: cpu.send_tensor_list(tensors, 1),
            lambda: cpu.send_tensor_dict(many, 1),
            lambda: shm_calls.send_object(cpu._handle, {"x": 1}, 1),
            lambda: shm_calls.send_object(cpu._handle, [1], 1),
            lambda: cpu.send_tensor_dict(many, 1),
        ]  # fmt: skip
        receives = [
            (lambda: world.recv_tensor_dict(0), "an object of type dict, and a tensor dict"),
            (lambda: world.recv_object(0), "a tensor dict, and an object"),
            (lambda: cpu.recv_tensor_dict(0), "a tensor list, and a tensor dict"),
            (lambda: cpu.recv_tensor_list(0), "a tensor dict, and a tensor list"),
            (lambda: cpu.recv_tensor_dict(0), "an object of type dict, and a tensor dict"),
            (lambda: cpu.recv_tensor_list(0), "an object of type list, and a tensor list"),
            (lambda: shm_calls.recv_object(cpu._handle, 0), "a tensor dict, and an object"),
        ]
        for send, (receive, text) in zip(sends, receives, strict=True):
            if rank.rank == 0:
                send()
            else:
                with pytest.raises(CommMismatchError, match=text) as caught:
                    receive()
                assert "rank 0 sent" in str(caught.value)
            if rank.rank == 0:
                world.send_tensor_dict(many)
                cpu.send_tensor_dict(many, 1)
            else:
                assert same(world.recv_tensor_dict(), many)
                assert same(cpu.recv_tensor_dict(0), many)
        # Collectives: the sending rank has made its call and goes on.
        if rank.rank == 0:
            world.broadcast_tensor_dict(many)
            world.broadcast_object({"x": 1})
        else:
            with pytest.raises(CommMismatchError, match="a tensor dict, and an object"):
                world.broadcast_object()
            with pytest.raises(CommMismatchError, match="an object of type dict"):
                world.broadcast_tensor_dict()
        assert same(world.broadcast_tensor_dict(many), many)
        assert cpu.all_reduce(torch.ones(2)).tolist() == [2, 2]


def test_something_else_than_is_asked_for_is_used_up() -> None:
    pool(2).run(other_kinds)


def not_dicts(rank: Rank, carrier: str) -> None:
    """What the sending rank must not pass: told to all in a collective, and nothing sent."""
    meta = {"x": torch.ones(2), "deep": [{"y": torch.empty(2, device="meta")}]}
    with world_of(rank, f"not dicts {carrier}") as world:
        cpu = communicator(rank)
        if carrier == "store":
            world._objects._queues[0] = Refusal("a test")
        for wrong, text in [
            (None, "a dict is expected on rank 0, and a NoneType"),
            ([torch.ones(1)], "a dict is expected on rank 0, and a list"),
            (meta, "on meta, and tensors on cpu are accepted"),
        ]:
            with pytest.raises(InvalidArgumentError, match=text):
                world.broadcast_tensor_dict(wrong if rank.rank == 0 else None)
            if rank.rank == 0:
                for send in (world.send_tensor_dict, cpu.send_tensor_dict):
                    with pytest.raises(InvalidArgumentError, match=text):
                        send(wrong, 1)
            assert world.broadcast_tensor_dict({"n": torch.ones(2)})["n"].tolist() == [1, 1]
        objects: Any = (1, 2) if rank.rank == 0 else [3, 4]
        with pytest.raises(InvalidArgumentError, match=r"a list is expected on rank 0.* tuple"):
            world.broadcast_object_list(objects)
        objects = (1, 2) if rank.rank == 1 else [3, 4]
        if rank.rank == 0:
            assert world.broadcast_object_list(objects) == [3, 4]
            for bad in ([torch.ones(2), 5], [torch.ones(2).to_mkldnn()]):
                with pytest.raises(InvalidArgumentError, match=r"int was given|mkldnn|Opaque"):
                    cpu.send_tensor_list(bad, 1)
            cpu.send_tensor_list([torch.eye(3).to_sparse(), torch.ones(2).conj()], 1)
        else:
            with pytest.raises(InvalidArgumentError, match=r"a list is expected on rank 1.* tuple"):
                world.broadcast_object_list(objects)
            sparse, ones = cpu.recv_tensor_list(0)
            assert torch.equal(sparse.to_dense(), torch.eye(3)) and ones.tolist() == [1, 1]
        assert world.broadcast_object(rank.rank) == 0, "still in step"


@pytest.mark.parametrize("carrier", ["queue", "store"])
def test_what_the_sender_must_not_pass_is_told_to_all(carrier: str) -> None:
    pool(2).run(not_dicts, carrier)


def any_dtype(rank: Rank, key: str) -> None:
    os.environ["COMMUNICATORS_DISABLE"] = "cpu_shm"
    names = [name for name in TENSORS if name not in SLOW_TO_MAKE]
    with world_of(rank, key) as world:
        assert "any size: torch_distributed" in world.explain()
        got = world.broadcast_tensor_dict({name: TENSORS[name]() for name in names})
        if rank.rank == 0:
            world.send_tensor_dict({name: TENSORS[name]() for name in names})
        else:
            assert same(got, {name: TENSORS[name]() for name in names})
            assert same(world.recv_tensor_dict(), got)


def test_dicts_of_every_dtype_over_gloo() -> None:
    for outcome in run_fresh(2, any_dtype, "any dtype"):
        assert not outcome.error, outcome.trace
