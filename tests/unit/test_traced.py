"""Collectives under torch.compile: made on every rank, in the program's order, by every backend."""

from __future__ import annotations

import pytest
import torch

from communicators.groups.coordinator import GroupCoordinator
from communicators.groups.traced import order_tensor
from tests.ranks import Rank, pool
from tests.unit.test_group_coordinator import part, world_of
from tests.unit.test_shm_collectives import communicator

BACKENDS = ["eager", "aot_eager", "inductor"]


def noting(*groups: GroupCoordinator) -> list[tuple[str, str]]:
    """The list in which these groups note, from now on, what they hand to a communicator."""
    calls: list[tuple[str, str]] = []
    for group in groups:
        (dispatcher,) = group._dispatchers.values()

        def run(op, *given, _run=dispatcher.run, _name=group.name, **named):
            calls.append((_name, op))
            return _run(op, *given, **named)

        def barrier(_barrier=group.group.barrier, _name=group.name):
            calls.append((_name, "barrier"))
            return _barrier()

        dispatcher.run, group.group.barrier = run, barrier  # type: ignore[method-assign]
    return calls


def program(tp, other, me, used):
    """Every collective of two groups; what `used` does not name is computed for nothing."""

    def step(x):
        n = x.shape[0]
        found = {"all_reduce": tp.all_reduce(x), "gather": other.gather(x * 2, 0, 0)}
        found["reduce_scatter"] = tp.reduce_scatter(x, 0)
        other.barrier()
        found["reduce_scatterv"] = tp.reduce_scatterv(x, [n - 1, 1], 0)
        found["all_gather"] = other.all_gather(x + 1, -1)
        if me == 0:
            tp.send(x * 3)
            found["recv"] = tp.recv((n, 3), torch.float32)
        else:
            found["recv"] = tp.recv((n, 3), torch.float32)
            tp.send(x * 3)
        found["all_gatherv"] = tp.all_gatherv(x[:1] if me == 0 else x, [1, n], 0)
        found["in place"] = x.clone()
        tp.all_reduce_(found["in place"])
        found["strided"] = x.clone().t()
        other.broadcast(found["strided"], 1)
        tp.all_reduce(x, exact=True)
        other.all_reduce(x)
        tp.barrier()
        return x + 1, {name: found[name] for name in used}

    return step


ALL = ("all_reduce", "gather", "reduce_scatter", "reduce_scatterv", "all_gather", "recv",
       "all_gatherv", "in place", "strided")  # fmt: skip


def every_collective(rank, key, backend, unused_on):
    """The same calls in the same order as without a compiler, and the same results."""
    with world_of(rank, key) as tp:
        other = GroupCoordinator([1, 0], "cpu", "other")
        calls = noting(tp, other)
        me = tp.rank_in_group
        step = program(tp, other, me, () if me in unused_on else ALL)
        torch._dynamo.reset()
        compiled = torch.compile(step, backend=backend, fullgraph=True)
        graphs = torch._dynamo.utils.counters["stats"]
        before = graphs["unique_graphs"]
        for rows in (6, 4, 10):
            x = part(me, rows, 3)
            torch._dynamo.mark_dynamic(x, 0)
            expected, wanted = step(x), list(calls)
            calls.clear()
            got = compiled(x)
            assert calls == wanted
            calls.clear()
            assert torch.equal(got[0], expected[0])
            for name, value in expected[1].items():
                other_value = got[1][name]
                assert (value is None) == (other_value is None), name
                if value is not None:
                    assert torch.equal(value, other_value), name
                    assert value.stride() == other_value.stride(), name
        assert graphs["unique_graphs"] - before == 1, "one graph serves all sizes"
        other.close()
        return len(wanted)


@pytest.mark.parametrize(
    ("backend", "unused_on"),
    # Not used at all is the hard case; inductor is slow.
    [(backend, ranks) for backend in BACKENDS for ranks in ((), (1,), (0, 1))
     if ranks or backend != "inductor"],
)  # fmt: skip
def test_every_collective_is_made_in_order(backend, unused_on):
    key = f"traced {backend} {unused_on}"
    made = pool(2).run(every_collective, key, backend, unused_on, deadline_s=240)
    assert made == [14, 14]


def handed_over(rank: Rank, key, backend):
    """faults.md 4: nothing here is used by the ranks that send, and the group stays in step."""
    with world_of(rank, key) as tp:

        def pipeline(x):
            tp.gather(x, 0, 0)
            if tp.is_first_rank:
                tp.send(x, 1)
                return x
            return tp.recv((4,), torch.float32, 0)

        torch._dynamo.reset()
        x = torch.full((4,), float(rank.rank + 1))
        assert torch.compile(pipeline, backend=backend)(x).tolist() == [1.0] * 4
        assert tp.all_reduce(x).tolist() == [3.0] * 4, "in step"


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_nobody_uses_is_still_sent(backend):
    pool(2).run(handed_over, f"sent {backend}", backend, deadline_s=120)


def operators(rank: Rank, key):
    with world_of(rank, key) as tp:
        ops, name, me = torch.ops.communicators, tp.name, tp.rank_in_group
        order, x = order_tensor(), torch.arange(12.0).view(4, 3)
        cases = [
            (ops.group_all_reduce, (x, name)),
            (ops.group_all_reduce, (x, name, True, "sum", order)),
            (ops.group_all_reduce_, (x.clone(), name, False, "max", order)),
            (ops.group_reduce, (x, 1, me, name, "product", order)),
            (ops.group_all_to_all_single, (x, [2, 2], [2, 2], name, order)),
            (ops.group_scatter, (x.clone(), [x, x + 1] if me == 0 else None, 0, name, order)),
            (ops.group_all_gather, (x, 1, 2, name)),
            (ops.group_all_gather, (torch.tensor(1.0), 0, 2, name, order)),
            (ops.group_all_gatherv, (x[: me + 1], [1, 2], 0, name, order)),
            (ops.group_reduce_scatter, (x, 0, 2, name, order)),
            (ops.group_reduce_scatterv, (x, [1, 3], 0, me, name, order)),
            (ops.group_gather, (x, 1, -1, 2, me, name, order)),
            (ops.group_broadcast, (x.clone(), 0, name, order)),
            (ops.group_barrier, (name, order)),
        ]
        for operator, arguments in cases:
            torch.library.opcheck(
                operator.default, arguments, test_utils=("test_schema", "test_faketensor")
            )
        y = torch.ones(3, requires_grad=True)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            torch.compile(lambda y: tp.all_reduce(y * 2).sum(), backend="eager")(y).backward()


def test_the_operators_are_sound():
    pool(2).run(operators, "operators", deadline_s=120)


def one_rank(rank: Rank, key):
    with world_of(rank, key) as alone:

        def step(x):
            alone.barrier()
            alone.all_reduce_(x)
            alone.broadcast(x, 0)
            return alone.all_reduce(x), alone.gather(x), alone.reduce_scatterv(x, [3], 0)

        x = torch.arange(3.0)
        for value in torch.compile(step, backend="aot_eager", fullgraph=True)(x):
            assert torch.equal(value, x)


def test_a_group_of_one_rank():
    pool(1).run(one_rank, "one")


def shared_memory(rank: Rank, backend):
    """The native operators themselves, and CpuCommunicator, which calls them."""
    cpu = communicator(rank)
    ops, handle, peer = torch.ops.communicators, cpu._handle, 1 - rank.rank

    def unused(x):
        ops.shm_all_reduce(x, handle)
        ops.shm_all_reduce_out(torch.empty_like(x), x, handle)
        ops.shm_all_gather(x.new_empty(2 * x.numel()), x, x.numel(), handle)
        ops.shm_gather(x.new_empty(2 * x.numel()) if rank.rank == 0 else None, x, x.numel(), 0,
                       handle)  # fmt: skip
        ops.shm_reduce_scatter(x.new_empty(x.numel() // 2), x, x.numel() // 2, handle)
        ops.shm_barrier(handle)
        return x + 1

    def ordered(x):
        cpu.all_reduce(x)
        cpu.gather(x, 1, 0)
        cpu.barrier()
        cpu.reduce_scatter(x * 2, 0)
        y = x.clone()
        cpu.broadcast(y, peer if rank.rank else rank.rank)
        cpu.all_reduce_(y)
        return cpu.all_gather(y, 0)

    x = torch.full((4,), float(rank.rank + 1))
    torch._dynamo.reset()
    assert torch.equal(torch.compile(unused, backend=backend, fullgraph=True)(x), x + 1)
    assert cpu.all_reduce(x).tolist() == [3.0] * 4, "in step"
    got = torch.compile(ordered, backend=backend, fullgraph=True)(x)
    assert torch.equal(got, ordered(x))
    assert cpu.all_reduce(x).tolist() == [3.0] * 4, "in step"


@pytest.mark.parametrize("backend", BACKENDS)
def test_native_operators_are_kept(backend):
    pool(2).run(shared_memory, backend, deadline_s=120)
