"""Group: gather, broadcast, objects between two ranks, deadlines that name the late rank."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from communicators import (
    CommMismatchError,
    CommTimeoutError,
    Group,
    InvalidArgumentError,
    Settings,
    TorchDistributedCommunicator,
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


class _Unregistered:
    """ProcessGroups that torch.distributed does not know, over one store."""

    def __init__(self, path):
        self.path = str(path)

    def store(self):
        return dist.PrefixStore("tcp://somewhere", dist.FileStore(self.path, 2))

    def stateless(self, rank):  # as vLLM makes them
        group = dist.ProcessGroup(self.store(), rank, 2)
        backend = dist.ProcessGroupGloo(self.store(), rank, 2)
        group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
        return group

    def bare(self, rank):  # without a backend
        return dist.ProcessGroup(self.store(), rank, 2)

    def named(self, rank):
        group = self.stateless(rank)
        group._set_group_name("mine")
        return group


@pytest.mark.parametrize("kind", ["stateless", "bare", "named"])
def test_a_process_group_that_torch_distributed_does_not_know(tmp_path, kind):
    made = _Unregistered(tmp_path / "store")

    def body(rank):
        process_group = getattr(made, kind)(rank)
        group = Group.of(process_group, Settings(timeout_s=10))
        again = Group.of(process_group, Settings(timeout_s=10))
        assert (group.rank, group.world_size, group.ranks) == (rank, 2, [0, 1])
        assert group.process_group is None and group.name != again.name
        refusal = TorchDistributedCommunicator(again, torch.device("cpu")).refusal
        assert "no torch.distributed process group behind it" in str(refusal)
        return group.gather_objects("who", rank), again.gather_objects("who", rank * 10)

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(body, range(2))) == [([0, 1], [0, 10])] * 2


def test_a_process_group_without_a_store_is_refused(tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"rank 0 of 2 has no store.*is accepted"):
        Group.of(dist.ProcessGroup(0, 2))
    backend = dist.ProcessGroupGloo(dist.FileStore(str(tmp_path / "store"), 1), 0, 1)
    with pytest.raises(InvalidArgumentError, match=r"ProcessGroupGloo.*Group\(store, rank"):
        Group.of(backend)
