"""QuickAllReduce without a GPU: who is allowed to round, its operator, and its binding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from communicators import Capability, QuickAllReduce, Settings
from communicators.backends.quick import codecs as quick
from communicators.base import Communicator, Request
from communicators.bindings import collectives, native
from communicators.errors import InvalidArgumentError
from communicators.groups.traced import order_tensor
from communicators.selection.dispatcher import Dispatcher
from communicators.selection.opening import candidates
from communicators.selection.policy import choose
from communicators.selection.tables import EMPTY
from tests.threads import run_ranks

LOSSY = ("Q8", "Q6", "Q4")
SUMS = frozenset({"all_reduce"})


class OnCpu(QuickAllReduce):
    """Live without a GPU: what it would launch goes to the operator's stand-in on the CPU."""

    def __init__(self, group, codec, least_bytes=0):
        super().__init__(group, "cuda:0", codec, least_bytes)
        self.device = torch.device("cpu")

    def capability(self):
        return Capability(SUMS, frozenset({torch.bfloat16}), rounds=self._rounds())

    def allocate(self):
        return b"", self.codec

    def rendezvous(self, handles):
        self._handle = 7
        self._order = order_tensor()

    def release(self):
        self._handle = 0


@pytest.fixture(scope="module")
def stand_in():
    """The operator on CPU tensors, for a world of two whose other rank always holds ones."""
    native.load("cpu")
    collectives.register_quick_fake()
    library = torch.library.Library("communicators", "IMPL")

    def run(fa, inp, out, codec, order=None):
        assert fa == 7
        out.copy_(quick.all_reduce([inp, torch.ones_like(inp)], collectives.CODECS[codec]))

    library.impl("quick_all_reduce", run, "CPU")
    yield
    library._destroy()


@pytest.mark.parametrize("codec", collectives.CODECS)
def test_torch_compile_traces_through_it(stand_in, codec):
    (comm,) = run_ranks(1, lambda group: OnCpu(group, codec))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def layer(x):
        y = comm.quick_all_reduce(x * 2)
        comm.quick_all_reduce(y, out=y)
        return y + 1

    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).bfloat16()
    once = quick.all_reduce([x * 2, torch.ones_like(x)], codec)
    expected = quick.all_reduce([once, torch.ones_like(x)], codec) + 1
    assert torch.equal(torch.compile(layer, fullgraph=True, backend=backend)(x), expected)
    (graph,) = graphs
    assert str(graph.graph).count("communicators.quick_all_reduce") == 2
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
    comm.close()


def test_the_operator_is_sound(stand_in):
    operator = torch.ops.communicators.quick_all_reduce.default
    x = torch.ones(64, dtype=torch.bfloat16)
    torch.library.opcheck(
        operator, (7, x, torch.empty_like(x), 1), test_utils=("test_schema", "test_faketensor")
    )
    fake = torch._subclasses.FakeTensorMode()
    with fake, pytest.raises(RuntimeError, match="inp and out must have the same size"):
        operator(7, torch.empty(4, dtype=torch.half), torch.empty(5, dtype=torch.half), 1)


def test_it_refuses_unless_a_codec_was_allowed():
    assert candidates("cuda")[0] is QuickAllReduce
    assert Settings().quick_codec == ""
    for comm in run_ranks(2, lambda group: QuickAllReduce(group, "cuda:0")):
        assert str(comm.refusal).startswith("it rounds, and no codec was allowed")
        assert not comm.should_quick_allreduce(torch.ones(1 << 23, dtype=torch.half))
    for error in run_ranks(2, lambda group: QuickAllReduce(group, "cuda:0", "Q5")):
        assert isinstance(error, InvalidArgumentError)


def test_codecs_that_differ_are_a_refusal_on_all_ranks():
    class Exchanging(OnCpu):
        rendezvous = QuickAllReduce.rendezvous

        def allocate(self):
            stand_in: Any = object()
            self._buffer = self._library = stand_in
            return super().allocate()

    codecs = ("Q8", "Q4")
    for comm in run_ranks(2, lambda group: Exchanging(group, codecs[group.rank])):
        assert "rank 0 has codec Q8 and rank 1 Q4" in str(comm.refusal)


class Exact(Communicator):
    name = "exact"

    def __init__(self, group):
        self.calls = 0
        super().__init__(group, torch.device("cpu"))

    def capability(self):
        return Capability(SUMS)

    def run(self, op, out, inp, root=0, by="sum", splits=None):
        self.calls += 1


class Counting(OnCpu):
    calls = 0

    def run(self, op, out, inp, root=0, by="sum", splits=None):
        self.calls += 1


@pytest.mark.parametrize("codec", collectives.CODECS)
def test_an_exact_call_never_rounds(codec):
    def body(group):
        opened = [Counting(group, codec), Exact(group)]
        return Dispatcher(group, torch.device("cpu"), opened)

    (dispatcher,) = run_ranks(1, body)
    rounding, exact = dispatcher.live
    x = torch.ones(64, dtype=torch.bfloat16)
    for _ in range(2):
        dispatcher.run("all_reduce", x, x)
        dispatcher.run("all_reduce", x, x, exact=True)
    # FP sends all bits of a value, so it serves exact calls too.
    assert (rounding.calls, exact.calls) == ((2, 2) if codec in LOSSY else (4, 0))
    text = dispatcher.explain()
    assert (f"; it rounds, as allowed: {codec}, " in text) == (codec in LOSSY)


def test_the_policy_says_why():
    live = [("quick", Capability(SUMS, rounds="Q8")), ("exact", Capability(SUMS))]
    request = Request("all_reduce", torch.bfloat16, 64)
    allowed = choose(request, live, EMPTY)
    assert allowed.communicator == "quick"
    assert allowed.reason.endswith("; it rounds, as allowed: Q8")
    refused = choose(Request("all_reduce", torch.bfloat16, 64, exact=True), live, EMPTY)
    assert refused.communicator == "exact"
    assert str(refused.refused["quick"]) == "it rounds (Q8), and this call is exact"
