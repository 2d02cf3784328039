"""GroupCoordinator and parallel_state over CPU ranks: all calls, worlds 1 to 8, any layout."""

import contextlib
import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from communicators import InvalidArgumentError, TopologyError, parallel_state
from communicators.groups.coordinator import GroupCoordinator
from communicators.groups.open_groups import OPEN_GROUPS
from tests.ranks import pool, run_fresh

WORLDS = [1, 2, 3, 4, 8]


@contextlib.contextmanager
def world_of(rank, key, timeout_s=30):
    """The environment that torchrun would make; everything is closed again after the test."""
    for name, value in (("WORLD_SIZE", rank.world_size), ("RANK", rank.rank)):
        os.environ[name] = str(value)
    os.environ["COMMUNICATORS_TIMEOUT_S"] = str(timeout_s)
    store = dist.PrefixStore(key, rank.store())
    dist.init_process_group(
        "gloo", store=store, rank=rank.rank, world_size=rank.world_size,
        timeout=timedelta(seconds=timeout_s),
    )  # fmt: skip
    try:
        yield parallel_state.init_distributed_environment()
    finally:
        parallel_state.destroy_distributed_environment()
        assert not OPEN_GROUPS


def part(rank, *shape, dtype=torch.float32):
    """What rank `rank` contributes; every rank can make everybody's."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(shape, generator=generator).to(dtype)


def rank_ordered_sum(world_size, *shape, dtype):
    total = torch.zeros(shape)
    for rank in range(world_size):
        total += part(rank, *shape, dtype=dtype).float()
    return total.to(dtype)


def tensors(rank, key):
    with world_of(rank, key) as world:
        size, me = world.world_size, world.rank_in_group
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = part(me, 6, 5 * size, dtype=dtype)
            expected = rank_ordered_sum(size, 6, 5 * size, dtype=dtype)
            assert torch.equal(world.all_reduce(x), expected)
            assert torch.equal(x, part(me, 6, 5 * size, dtype=dtype)), "all_reduce is not in place"
            strided = part(me, 6, 5 * size, dtype=dtype).t().contiguous().t()
            assert world.all_reduce_(strided) is strided
            assert torch.equal(strided, expected)
            mine = expected[:, me * 5 : me * 5 + 5]
            for dim in (1, -1):
                assert torch.equal(world.reduce_scatter(x, dim), mine)
            sizes = [2 * r + 1 for r in range(size)]
            ragged = part(me, sum(sizes), 3, dtype=dtype)
            total = rank_ordered_sum(size, sum(sizes), 3, dtype=dtype)
            assert torch.equal(world.reduce_scatterv(ragged, sizes), total.split(sizes)[me])
        parts = [part(r, 2, 3, 4) for r in range(size)]
        for dim in (0, 1, 2, -1, -3):
            gathered = world.all_gather(parts[me], dim)
            assert torch.equal(gathered, torch.cat(parts, dim))
            assert gathered.is_contiguous()
        column = world.all_gather(part(me, 4, 1), 1)
        assert column.is_contiguous() and column.shape == (4, size)
        for dim in (0, -1):
            for dst in {0, size - 1}:
                gathered = world.gather(parts[me], dst, dim)
                assert (gathered is None) == (me != dst)
                assert gathered is None or torch.equal(gathered, torch.cat(parts, dim))
        ragged_parts = [part(r, 2, r + 1) for r in range(size)]
        joined = world.all_gatherv(ragged_parts[me], [r + 1 for r in range(size)], dim=1)
        assert torch.equal(joined, torch.cat(ragged_parts, 1))
        for src in {0, size - 1}:
            x = part(me, 3, 3).t()
            assert world.broadcast(x, src) is x
            assert torch.equal(x, part(src, 3, 3).t())
        for empty in (torch.empty(0), torch.empty(3, 0)):
            assert world.all_reduce(empty).shape == empty.shape
            assert world.all_gather(empty, 0).shape[0] == size * empty.shape[0]
        flags = torch.tensor([me % 2 == 0, True])
        assert world.all_gather(flags).tolist() == [v for r in range(size) for v in (r % 2 == 0, 1)]
        assert torch.equal(world.all_reduce(torch.tensor(2.0)), torch.tensor(2.0 * size))
        world.barrier()
        return world.explain()


@pytest.mark.parametrize("world_size", WORLDS)
def test_every_collective(world_size):
    for text in pool(world_size).run(tensors, f"tensors {world_size}"):
        if world_size > 1:
            assert text.count("any size: cpu_shm, the first in order of preference") == 1
            assert "not torch_distributed: takes it, and comes after cpu_shm" in text


def objects(rank, key):
    with world_of(rank, key) as world:
        size, me = world.world_size, world.rank_in_group
        assert world.broadcast_object({"from": me}, src=size - 1) == {"from": size - 1}
        texts = [f"{me}-{i}" for i in range(3)]
        assert world.broadcast_object_list(texts) is texts
        assert texts == ["0-0", "0-1", "0-2"]
        given = {
            "x": part(7, 4, 5), "strided": part(8, 4, 5).t(), "empty": torch.empty(0, 2),
            "half": part(9, 3, dtype=torch.bfloat16), "nested": {"ids": torch.arange(5), "n": None},
            "flags": torch.tensor([True, False]), "text": "x", "number": 1.5,
        }  # fmt: skip
        for src in {0, size - 1}:
            got = world.broadcast_tensor_dict(given if me == src else None, src)
            same_dict(got, given)
        if size > 1:  # around the ring, and by name
            if me == 0:
                world.send_tensor_dict(given)
                same_dict(world.recv_tensor_dict(), given)
            else:
                same_dict(world.recv_tensor_dict(), given)
                world.send_tensor_dict(given)
            if me == 0:
                world.send(part(1, 9, 2).t(), size - 1)
                world.send_object("after", size - 1)
            if me == size - 1:
                assert torch.equal(world.recv((2, 9), torch.float32, 0), part(1, 9, 2).t())
                assert world.recv_object(0) == "after"


def same_dict(got, expected):
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert got[key].dtype == value.dtype
            assert torch.equal(got[key], value)
        elif isinstance(value, dict):
            same_dict(got[key], value)
        else:
            assert got[key] == value


@pytest.mark.parametrize("world_size", WORLDS)
def test_objects_and_tensor_dicts(world_size):
    pool(world_size).run(objects, f"objects {world_size}")


def layout(rank, key, tp, pp):
    with world_of(rank, key) as world:
        parallel_state.initialize_model_parallel(tp, pp)
        assert parallel_state.model_parallel_is_initialized()
        found = [parallel_state.get_group(name) for name in ("tp", "pp", "dp")]
        for group in found:
            one_hot = torch.zeros(world.world_size)
            one_hot[world.rank] = 1
            members = group.all_reduce(one_hot).nonzero().flatten().tolist()
            assert members == sorted(group.ranks)
        summed = parallel_state.tensor_model_parallel_all_reduce(torch.ones(2))
        assert summed.tolist() == [tp, tp]
        stage = found[1]
        if pp > 1 and not stage.is_last_rank:
            stage.send(torch.full((2,), float(world.rank)))
        if pp > 1 and not stage.is_first_rank:
            assert stage.recv((2,), torch.float32).tolist() == [float(stage.prev_rank)] * 2
        parallel_state.destroy_model_parallel()
        assert not parallel_state.model_parallel_is_initialized()
        return [group.ranks for group in found]


@pytest.mark.parametrize(
    ("world_size", "tp", "pp"),
    [(1, 1, 1), (2, 2, 1), (2, 1, 2), (3, 3, 1), (5, 1, 5), (6, 3, 2), (6, 2, 3), (7, 7, 1),
     (8, 2, 2), (8, 4, 2), (4, 2, 1)],
)  # fmt: skip
def test_layouts(world_size, tp, pp):
    ranks = pool(world_size).run(layout, f"layout {world_size} {tp} {pp}", tp, pp)
    for rank, (tp_ranks, pp_ranks, dp_ranks) in enumerate(ranks):
        assert (len(tp_ranks), len(pp_ranks)) == (tp, pp)
        assert len(dp_ranks) == world_size // (tp * pp)
        assert tp_ranks == list(range(rank // tp * tp, rank // tp * tp + tp))
        assert all(rank in group for group in (tp_ranks, pp_ranks, dp_ranks))


def codecs(rank, key):
    with world_of(rank, key) as world:
        with pytest.raises(InvalidArgumentError, match="codec 'Q5' is not one of FP, Q8, Q6, Q4"):
            parallel_state.initialize_model_parallel(2, 1, all_reduce_codec="Q5")
        parallel_state.initialize_model_parallel(2, 1, all_reduce_codec="Q6")
        found = {name: parallel_state.get_group(name).settings for name in ("tp", "pp", "dp")}
        assert {name: one.quick_codec for name, one in found.items()} == {
            "tp": "Q6", "pp": "", "dp": ""
        }  # fmt: skip
        assert world.settings.quick_codec == ""


def test_only_the_tensor_parallel_group_may_round():
    pool(2).run(codecs, "codecs")


def uneven(rank, key):
    with world_of(rank, key):
        parallel_state.initialize_model_parallel(
            1, 1, group_ranks={"tp": [[0, 3, 1], [4, 2]], "odd": [[4], [1, 3]]}
        )
        tp = parallel_state.get_tp_group()
        return tp.ranks, tp.all_gather(torch.tensor([rank.rank])).tolist(), "odd" in OPEN_GROUPS


def test_uneven_groups_of_any_ranks_in_any_order():
    results = pool(5).run(uneven, "uneven")
    for rank, (ranks, gathered, in_odd) in enumerate(results):
        expected = [0, 3, 1] if rank in (0, 1, 3) else [4, 2]
        assert ranks == gathered == expected
        assert in_odd == (rank in (1, 3, 4))


def by_hand(rank, key):
    """Groups that only their members make, by ranks that have different numbers of them open."""
    with world_of(rank, key):
        alone = GroupCoordinator([0], "cpu", "alone") if rank.rank == 0 else None
        ring = GroupCoordinator([2, 0, 1], "cpu", "ring")
        pair = GroupCoordinator([2, 1], "cpu", "pair") if rank.rank > 0 else None
        gathered = ring.all_gather(torch.tensor([rank.rank])).tolist()
        used = ring.explain()
        for group in (alone, ring, pair):
            if group is not None:
                group.close()
        return gathered, used


def by_hand_over_gloo(rank, key):
    os.environ["COMMUNICATORS_DISABLE"] = "cpu_shm"
    return by_hand(rank, key)


@pytest.mark.parametrize("body", [by_hand, by_hand_over_gloo])
def test_groups_made_by_their_members_alone(body):
    for outcome in run_fresh(3, body, body.__name__):
        assert not outcome.error, outcome.trace
        gathered, used = outcome.value
        assert gathered == [2, 0, 1], "in the order of the group, not sorted"
        assert ("any size: torch_distributed" in used) == (body is by_hand_over_gloo)


def wrong_arguments(rank, key):
    with world_of(rank, key) as world:
        x = torch.zeros(3, 4)
        cases = [
            (lambda: world.all_gather(x, 2), "x [3, 4] has dims -2..1"),
            (lambda: world.gather(x, dst=2), "ranks of this group are 0..1"),
            (lambda: world.broadcast(x, src=-1), "broadcast(src=-1)"),
            (lambda: world.reduce_scatter(x, 0), "not a multiple of the 2 ranks"),
            (lambda: world.reduce_scatterv(x, [1, 1]), "with sum 3"),
            (lambda: world.all_gatherv(x, [3]), "2 sizes >= 0"),
            (lambda: world.all_gatherv(x, [1, 2]), "has size 3 and sizes says"),
            (lambda: world.send(x, world.rank_in_group), "this rank itself"),
            (lambda: world.all_reduce(x.to("meta")), "communicates from cpu"),
            (lambda: world.recv_object(5), "another rank of the group"),
        ]
        for call, message in cases:
            with pytest.raises(InvalidArgumentError) as caught:
                call()
            assert message in str(caught.value)
        for sizes in ((3, 1), (0, 1), (2, 2)):
            with pytest.raises(TopologyError, match="cannot be split"):
                parallel_state.initialize_model_parallel(*sizes)
        with pytest.raises(TopologyError, match="open already"):
            GroupCoordinator([0, 1], "cpu", "world")
        with pytest.raises(TopologyError, match="distinct ranks"):
            GroupCoordinator([1 - rank.rank], "cpu", "other")
        assert world.all_reduce(torch.ones(1)).tolist() == [2.0], "still in order"


def test_wrong_arguments_are_sentences_and_change_nothing():
    pool(2).run(wrong_arguments, "wrong")


def traced(rank, key):
    with world_of(rank, key) as world:

        def layer(x):
            y = world.all_reduce(x * 2)
            world.all_reduce_(y, exact=True)
            return world.all_gather(y + 1, dim=-1)

        x = part(world.rank_in_group, 4, 6)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), layer(x))
        torch.library.opcheck(torch.ops.communicators.group_all_reduce, (x, world.name))
        torch.library.opcheck(
            torch.ops.communicators.group_all_gather, (x, 1, world.world_size, world.name)
        )


def test_torch_compile_traces_through():
    pool(2).run(traced, "traced", deadline_s=120)


def over_gloo(rank, key):
    os.environ["COMMUNICATORS_DISABLE"] = "cpu_shm"
    return tensors(rank, key)


def test_the_fallback_passes_the_same_collectives():
    """gloo's own sums are not rank-ordered; two terms are the same in any order."""
    for outcome in run_fresh(2, over_gloo, "gloo"):
        assert not outcome.error, outcome.trace
        assert "any size: torch_distributed" in outcome.value
        assert "not opened: cpu_shm: disabled by COMMUNICATORS_DISABLE" in outcome.value
