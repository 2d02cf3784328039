"""Group: gather, broadcast, objects between two ranks, deadlines that name the late rank."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

from communicators import (
    CommMismatchError,
    CommTimeoutError,
    CommunicatorError,
    Group,
    InvalidArgumentError,
    Settings,
    TorchDistributedCommunicator,
)
from communicators.groups import objects
from tests.ranks import pool
from tests.threads import run_ranks
from tests.unit.awkward import Poison

Gloo: Any = dist.ProcessGroupGloo  # whose stub names arguments that have defaults


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


def refusals(group):
    """One rank's value does not pickle, or does not unpickle: who raises what, and what follows."""
    found = []
    for value in (lambda: 0, Poison()):
        try:
            found.append(group.gather_objects("x", value if group.rank == 1 else b"x" * 100_000))
        except CommunicatorError as error:
            found.append(error)
        assert group.gather_objects("next", group.rank) == [0, 1, 2]
    return found


def test_a_refusal_of_one_rank_is_everybodys_and_all_stay_in_step():
    results = run_ranks(3, refusals)
    texts = {str(refused) for refused, _ in results}
    assert len(texts) == 1 and all(type(r) is InvalidArgumentError for r, _ in results)
    assert "gather_objects('x', value): a function that cannot be pickled" in texts.pop()
    for rank in (0, 2):
        assert type(results[rank][1]) is CommunicatorError
        assert "what rank 1 sent arrived whole and cannot be unpickled" in str(results[rank][1])
    assert isinstance(results[1][1], list), "the rank that has the value has the others', too"


def test_after_a_mismatch_the_ranks_are_in_step():
    def body(group):
        with pytest.raises(CommMismatchError, match=r"step \d.*step \d"):
            group.gather_objects(f"step {group.rank}", b"x" * 100_000)
        before = group.gather_objects("next", group.rank)
        group.barrier()
        return before, group.store.num_keys() < 12

    assert run_ranks(2, body) == [([0, 1], True)] * 2


class HalfAStore(dist.Store):
    """Lets `budget` writes through, then fails as a lost store does, or as Ctrl-C would."""

    def __init__(self, store, budget, error):
        super().__init__()
        self.store, self.budget, self.error = store, budget, error
        for name in ("get", "wait", "check", "delete_key", "add", "multi_get", "num_keys"):
            setattr(self, name, getattr(store, name))

    def set(self, key, value):
        self.budget -= 1
        if self.budget == 0:
            raise self.error
        self.store.set(key, value)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), dist.DistNetworkError("reset")], ids=repr)
@pytest.mark.parametrize("budget", [1, 2, 3, 4])
def test_a_send_that_is_cut_short_has_moved_nothing(budget, error):
    def body(group):
        group.barrier()
        if group.rank == 1:
            return group.recv_object(0)
        keys, meeting = group.store.num_keys(), group._waiter.meeting
        run = meeting._run

        def fails_once(function, call):
            meeting._run = run
            return run(lambda store, call: function(HalfAStore(store, budget, error), call), call)

        meeting._run = fails_once
        with pytest.raises((KeyboardInterrupt, CommTimeoutError)):
            group.send_object(b"x" * (9 << 20), 1)  # three pieces and the message's own key
        assert group.store.num_keys() == keys
        return group.send_object("next", 1)

    assert run_ranks(2, body) == [None, "next"]


class Slow:
    """Interrupts whoever unpickles it, the first time."""

    def __reduce__(self):
        return interrupt_once, ()


def interrupt_once(done=[]):  # noqa: B006  (kept between calls)
    if not done:
        done.append(True)
        signal.raise_signal(signal.SIGINT)
    return "arrived"


def interrupted(rank):
    group = rank.group("interrupted", timeout_s=20.0)
    if rank.rank == 0:
        group.send_object(Slow(), 1)
        return None
    with pytest.raises(KeyboardInterrupt):
        group.recv_object(0)
    return group.recv_object(0)


def test_what_was_being_unpickled_at_ctrl_c_stays_the_next():
    assert pool(2).run(interrupted)[1] == "arrived"


def resident_mb(what="VmRSS"):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith(what))


def long_ones(rank, name):
    group = rank.group(name, timeout_s=30.0)
    group.barrier()
    keys = group.store.num_keys()
    value = bytes([rank.rank]) * (100 << 20)
    peak = resident_mb("VmHWM")
    if rank.rank == 0:
        group.send_object(value, 1)
    else:
        del value
        got = group.recv_object(0)
        assert len(got) == 100 << 20 and not any(got[:: 1 << 20])
        peak = resident_mb("VmHWM") - peak
        del got
    group.barrier()
    # Rank 1 may have counted what rank 0 had sent already, and be in the barrier still.
    assert rank.rank == 1 or group.store.num_keys() <= keys + 1
    value = b"y" * (20 << 20)
    assert group.broadcast_object(value if rank.rank == 0 else None) == value
    sizes = [len(x) for x in group.gather_objects("long", b"z" * ((10 + rank.rank) << 20))]
    assert sizes == [10 << 20, 11 << 20]
    group.barrier()
    return group.store.num_keys() - keys, peak


def test_a_hundred_megabytes_arrive_and_nothing_of_them_stays_in_the_store():
    ranks = pool(2)
    (left, _), (_, peak) = ranks.run(long_ones, "long 1")
    assert left <= 4, "the keys of the last barrier or two"
    assert peak < 230, "the payload, and the object"
    before = resident_mb()  # this process hosts the store, and its allocator keeps what it had
    ranks.run(long_ones, "long 2")
    assert resident_mb() - before < 120


def test_pieces_are_well_below_what_a_tcp_store_takes():
    assert objects.PIECE_BYTES <= (8 << 20) // 2
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = Group(store, 0, 2, settings=Settings(timeout_s=5))
    other = Group(store, 1, 2, settings=Settings(timeout_s=5))
    for size in range(-200, 200, 7):  # around a whole number of pieces, and of what lies inline
        for about in (objects.PIECE_BYTES, objects.INLINE_BYTES) if size % 3 == 0 else ():
            value = b"x" * (about + size)
            group.send_object(value, 1)
            assert other.recv_object(0) == value


class _Unregistered:
    """ProcessGroups that torch.distributed does not know, over one store."""

    def __init__(self, path):
        self.path = str(path)

    def store(self):
        return dist.PrefixStore("tcp://somewhere", dist.FileStore(self.path, 2))

    def stateless(self, rank):  # as vLLM makes them
        group = dist.ProcessGroup(self.store(), rank, 2)
        backend = Gloo(self.store(), rank, 2)
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
        Group.of(dist.ProcessGroup(0, 2))  # type: ignore[call-arg]
    backend = Gloo(dist.FileStore(str(tmp_path / "store"), 1), 0, 1)
    with pytest.raises(InvalidArgumentError, match=r"ProcessGroupGloo.*Group\(store, rank"):
        Group.of(backend)
