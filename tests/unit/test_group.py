"""Group: gather, broadcast, objects between two ranks, deadlines that name the late rank."""

import time

import pytest
import torch.distributed as dist

from communicators import (
    CommMismatchError,
    CommTimeoutError,
    Group,
    InvalidArgumentError,
    Settings,
)
from tests.threads import run_ranks


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_gather_is_in_rank_order_on_every_rank(world_size):
    results = run_ranks(
        world_size,
        lambda group: [group.gather_objects("x", (group.rank, i)) for i in range(4)],
    )
    expected = [[(rank, i) for rank in range(world_size)] for i in range(4)]
    assert results == [expected] * world_size


def test_broadcast_and_point_to_point_keep_their_order():
    def body(group):
        value = group.broadcast_object({"from": group.rank}, src=2)
        if group.rank == 0:
            for i in range(3):
                group.send_object(i, 1)
        got = [group.recv_object(0) for _ in range(3)] if group.rank == 1 else None
        return value, got

    results = run_ranks(3, body)
    assert [value for value, _ in results] == [{"from": 2}] * 3
    assert results[1][1] == [0, 1, 2]


def test_a_late_rank_is_named_within_the_deadline():
    def body(group):
        if group.rank == 2:
            time.sleep(1.5)
            return None
        started = time.monotonic()
        with pytest.raises(CommTimeoutError, match="rank 2 of 3") as caught:
            group.gather_objects("step", 1, timeout_s=0.5)
        return str(caught.value), time.monotonic() - started

    results = run_ranks(3, body)
    for text, waited in results[:2]:
        assert "'step'" in text
        assert waited < 1.4


def test_ranks_at_different_steps_are_told_so():
    results = run_ranks(2, lambda group: group.gather_objects(f"step {group.rank}", None))
    assert all(isinstance(result, CommMismatchError) for result in results)
    assert "rank 0 is at 'step 0' and rank 1 at 'step 1'" in str(results[0])


def test_the_store_does_not_grow():
    store = dist.HashStore()
    counts = []

    def body(group):
        for i in range(50):
            group.gather_objects("x", i)
        return

    import threading

    def rank(r):
        body(Group(store, r, 2, settings=Settings(timeout_s=5)))
        counts.append(store.num_keys())

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert max(counts) < 12


def test_two_groups_of_one_name_do_not_read_each_others_keys():
    def body(group):
        first = Group(group.store, group.rank, 2, name="again", settings=group.settings)
        one = first.gather_objects("x", 1)
        second = Group(group.store, group.rank, 2, name="again", settings=group.settings)
        return one, second.gather_objects("x", 2), first.name != second.name

    assert run_ranks(2, body) == [([1, 1], [2, 2], True)] * 2


def test_wrong_ranks_are_refused():
    with pytest.raises(InvalidArgumentError, match=r"rank 2 is not in 0\.\.1"):
        Group(dist.HashStore(), 2, 2)
    results = run_ranks(1, lambda group: group.send_object(1, 0))
    assert isinstance(results[0], InvalidArgumentError)
    with pytest.raises(InvalidArgumentError, match="not initialised"):
        Group.of(None)
