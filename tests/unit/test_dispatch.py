"""Policy, tables and dispatcher: admitted, then measured, then the order of the list."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from communicators import (
    Capability,
    CommMismatchError,
    CommunicatorError,
    Refusal,
    Request,
    Settings,
)
from communicators.base import OPS, REDUCTIONS, Communicator
from communicators.errors import InvalidArgumentError
from communicators.selection.dispatcher import Dispatcher
from communicators.selection.policy import choose
from communicators.selection.tables import EMPTY, parse
from tests.threads import run_ranks
from tests.unit.table_maker import rows_table, table_text

SMALL = Capability(frozenset({"all_reduce"}), max_bytes=1024)
ALL = Capability(frozenset({"all_reduce", "all_gather"}), deterministic=False)
LIVE = [("small", SMALL), ("all", ALL)]


def request(nbytes, op="all_reduce", dtype=torch.bfloat16):
    return Request(op, dtype, nbytes)


def test_order_decides_without_a_row():
    choice = choose(request(64), LIVE, EMPTY)
    assert choice.communicator == "small"
    assert str(choice.refused["all"]) == "takes it, and comes after small"


def test_a_row_decides_where_there_is_one():
    table = parse(table_text(), "toy.json")
    assert choose(request(64), LIVE, table).communicator == "all"
    assert choose(request(256), LIVE, table).communicator == "all"
    assert choose(request(257), LIVE, table).communicator == "small"
    assert choose(request(513), LIVE, table).communicator == "small"
    assert choose(request(64, dtype=torch.float32), LIVE, table).communicator == "small"
    choice = choose(request(256), LIVE, table)
    assert choice.reason == "measured fastest, 2 us at 256 B (2 x Toy NV1, 2026-01-01)"
    assert str(choice.refused["small"]) == "measured 3.5 us against 2 at 256 B"


MOVES = [op for op in OPS if op not in REDUCTIONS]
ANY = Capability(frozenset(OPS))
THREE = [("a", ANY), ("b", ANY), ("c", ANY)]


@pytest.mark.parametrize("op", MOVES)
def test_what_moves_bytes_is_found_for_any_dtype(op):
    table = rows_table((op, "bfloat16", 4096, {"a": 9.0, "b": 5.0}))
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.uint8, torch.bool):
        choice = choose(request(4096, op, dtype), THREE, table)
        assert choice.communicator == "b", dtype
        assert "5 us at 4 KB (" in choice.reason


def test_rows_of_several_dtypes_are_one_list_where_bytes_are_moved():
    table = rows_table(
        ("all_gather", "float32", 1024, {"a": 2.0, "b": 1.0}),
        ("all_gather", "bfloat16", 1024, {"a": 0.9, "b": 1.5}),
        ("all_gather", "float16", 4096, {"a": 3.0, "b": 2.0}),
    )
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int64):
        assert choose(request(1024, "all_gather", dtype), THREE, table).communicator == "a"
        assert choose(request(4096, "all_gather", dtype), THREE, table).communicator == "b"


@pytest.mark.parametrize("op", ["all_reduce", "reduce_scatter"])
def test_a_reduction_is_found_by_its_dtype_or_one_of_the_same_size(op):
    only = rows_table((op, "bfloat16", 4096, {"a": 9.0, "b": 5.0}))
    choice = choose(request(4096, op, torch.float16), THREE, only)
    assert choice.communicator == "b"
    assert "measured fastest, 5 us at 4 KB of bfloat16 (" in choice.reason
    for dtype in (torch.float32, torch.int16, torch.float64, torch.uint8):
        choice = choose(request(4096, op, dtype), THREE, only)
        assert (choice.communicator, "measured" in choice.reason) == ("a", False), dtype
    both = rows_table(
        (op, "bfloat16", 4096, {"a": 9.0, "b": 5.0}), (op, "float16", 4096, {"a": 4.0, "b": 5.0})
    )
    choice = choose(request(4096, op, torch.float16), THREE, both)
    assert (choice.communicator, "bfloat16" in choice.reason) == ("a", False)


def test_the_order_stands_within_three_percent():
    for us, name in (
        ({"a": 100.0, "b": 99.9}, "a"), ({"a": 103.0, "b": 100.0}, "a"),
        ({"a": 103.1, "b": 100.0}, "b"), ({"a": 200.0, "b": 101.0, "c": 100.0}, "b"),
        ({"c": 100.0, "b": 102.0, "a": 104.0}, "b"),
    ):  # fmt: skip
        table = rows_table(("all_reduce", "bfloat16", 64, us))
        assert choose(request(64), THREE, table).communicator == name, us
    table = rows_table(("all_reduce", "bfloat16", 64, {"a": 200.0, "b": 101.0, "c": 100.0}))
    choice = choose(request(64), THREE, table)
    assert choice.reason.startswith(
        "measured within 3% of the fastest and before it in order, 101 us at 64 B ("
    )
    assert str(choice.refused["c"]) == "measured 100 us against 101 at 64 B"


NAMES = "abc"
times = st.dictionaries(st.sampled_from(NAMES), st.floats(0.1, 1e6), min_size=1)
measured = st.dictionaries(st.integers(1, 1 << 30), times, min_size=1, max_size=8)


@settings(deadline=None)
@given(measured, st.permutations(NAMES), st.booleans(), st.sets(st.sampled_from(NAMES)))
def test_a_measured_size_is_within_the_margin_of_the_best(points, order, merged, refusing):
    table = rows_table(
        *(("all_reduce", "bfloat16", size, us) for size, us in points.items()), merged=merged
    )
    nothing = Capability(frozenset())
    live = [(name, nothing if name in refusing else ANY) for name in order]
    admitted = [name for name in order if name not in refusing]
    for size, us in points.items():
        chosen = choose(request(size), live, table).communicator
        if not admitted:
            assert chosen is None
            continue
        if admitted[0] not in us:
            assert chosen == admitted[0], "what was not measured is not passed over"
            continue
        best = min(us[name] for name in admitted if name in us)
        assert us[chosen] <= 1.03 * best
        before = admitted[: admitted.index(chosen)]
        assert all(us[name] > 1.03 * best for name in before if name in us)


@settings(deadline=None)
@given(measured, st.integers(1, 1 << 31))
@example({1: {"a": 1.0}, 4: {"a": 2.0, "b": 1.0}}, 2)  # b has no time below 4
def test_explain_prints_what_is_chosen_at_any_size(points, size):
    def body(group):
        opened = [Recording(group, name, ANY) for name in NAMES]
        rows = [("all_reduce", "bfloat16", at, us) for at, us in points.items()]
        return Dispatcher(group, torch.device("cpu"), opened, rows_table(*rows))

    (d,) = run_ranks(1, body)
    ranges = d._ranges("all_reduce", torch.bfloat16, "eager")
    (mine,) = [
        last for low, high, _, last in ranges if low < size and (high is None or size <= high)
    ]
    chosen = d.select(request(size))
    if mine.communicator != chosen.communicator:  # a crossing may be rounded to the byte beside it
        beside = {d.select(request(size + step)).communicator for step in (-1, 1)}
        assert mine.communicator in beside


def test_between_two_measured_sizes_the_times_lie_on_a_line():
    rows = [
        ("all_reduce", "bfloat16", 1000, {"a": 10.0, "b": 20.0}),
        ("all_reduce", "bfloat16", 2000, {"a": 40.0, "b": 30.0}),
    ]
    table = rows_table(*rows)
    for size, name in ((1001, "a"), (1400, "a"), (1600, "b"), (1999, "b"), (3000, "b"), (5, "a")):
        assert choose(request(size), THREE, table).communicator == name, size
    choice = choose(request(1600), THREE, table)
    assert "26 us between 1000 B and 2000 B (" in choice.reason
    assert "10 us at 1000 B (" in choose(request(5), THREE, table).reason
    assert "30 us at 2000 B (" in choose(request(3000), THREE, table).reason
    # A merged row speaks for every size above the one before it.
    merged = rows_table(*rows, merged=True)
    for size, name in ((5, "a"), (1000, "a"), (1001, "b"), (2000, "b"), (3000, "b")):
        assert choose(request(size), THREE, merged).communicator == name, size


def test_explain_quotes_the_sizes_that_were_measured():
    def body(group, merged):
        opened = [Recording(group, name, ANY) for name in NAMES]
        rows = [
            ("all_reduce", "bfloat16", 65536, {"a": 2.3, "b": 9.0}),
            ("all_reduce", "bfloat16", 1 << 28, {"a": 748.78, "b": 913.0}),
        ]
        return Dispatcher(
            group, torch.device("cpu"), opened, rows_table(*rows[merged:], merged=merged)
        )

    (d,) = run_ranks(1, lambda group: body(group, False))
    quoted = "748.78 us at 256 MB (2 x Toy NV1, 2026-01-01); 2.3 us at 64 KB"
    assert f"any size: a, measured fastest, {quoted}\n" in d.explain()
    assert "measured fastest, 2.3 us at 64 KB (" in d.select(request(65536)).reason
    (d,) = run_ranks(1, lambda group: body(group, True))
    for nbytes in (1024, 65536, 1 << 28):
        assert "748.78 us at 256 MB (" in d.select(request(nbytes)).reason


def test_admission_comes_before_measurement():
    table = parse(table_text(rows__1__up_to_bytes=1 << 20), "toy.json")
    assert choose(request(1024), LIVE, table).communicator == "small"
    choice = choose(request(2048), LIVE, table)
    assert choice.communicator == "all"
    assert "2048 bytes are more than its 1024" in str(choice.refused["small"])


def test_a_row_does_not_speak_of_what_it_did_not_measure():
    table = parse(table_text(), "toy.json")
    allowed = [("quick", Capability(frozenset({"all_reduce"}), min_bytes=128)), *LIVE]
    assert choose(request(64), allowed, table).communicator == "all"
    choice = choose(request(128), allowed, table)
    assert choice.communicator == "quick"
    assert str(choice.refused["small"]) == "takes it, and comes after quick"
    assert "64 bytes are fewer than its 128" in str(choose(request(64), allowed, table).refused)


def test_nobody_takes_it():
    choice = choose(request(64, op="send"), LIVE, EMPTY)
    assert choice.communicator is None
    assert choice.reason == "no communicator takes it"
    assert str(choice.refused["all"]) == "it does only all_gather, all_reduce"


class Recording(Communicator):
    def __init__(self, group, name, capability):
        self.name = name  # type: ignore[misc]
        self.mine = capability
        self.calls = []
        super().__init__(group, torch.device("cpu"))

    def capability(self):
        return self.mine

    def run(self, op, out, inp, root=0, by="sum", splits=None):
        self.calls.append((op, root))


def dispatcher(group, table=EMPTY):
    opened = [
        Recording(group, "small", SMALL),
        Recording(group, "absent", Refusal("no such device")),
        Recording(group, "all", ALL),
    ]
    return Dispatcher(group, torch.device("cpu"), opened, table)


def test_what_explain_prints_is_what_runs():
    (d,) = run_ranks(1, dispatcher)
    text = d.explain()
    assert "  all_reduce; bfloat16, eager:\n    up to 1 KB: small, the first in order" in text
    assert "\n    above 1 KB: all, the first in order" in text
    assert "\n      not small: 2048 bytes" not in text, "the reason is of the size asked about"
    assert "  all_gather; bfloat16, eager:\n    any size: all" in text
    assert "  reduce_scatter, gather, broadcast, send, recv, reduce, scatter" in text
    assert "any size: nothing" in text
    assert "not opened: absent: no such device" in text
    small, large = torch.zeros(512, dtype=torch.bfloat16), torch.zeros(513, dtype=torch.bfloat16)
    for tensor, name in ((small, "small"), (large, "all"), (small, "small")):
        before = {c.name: len(c.calls) for c in d.live}
        d.run("all_reduce", tensor, tensor)
        after = {c.name: len(c.calls) for c in d.live}
        assert [n for n in after if after[n] != before[n]] == [name]


def test_errors_name_what_refuses():
    (d,) = run_ranks(1, dispatcher)
    x = torch.zeros(4)
    with pytest.raises(CommunicatorError, match=r"no communicator takes send .* on rank 0"):
        d.run("send", None, x, 1)
    with pytest.raises(InvalidArgumentError, match="the tensor is on meta"):
        d.run("all_reduce", x.to("meta"), x.to("meta"))


def test_different_tables_raise_on_all_ranks():
    def body(group):
        text = table_text(rows__0__up_to_bytes=100 + group.rank)
        return dispatcher(group, parse(text, f"table {group.rank}"))

    results = run_ranks(2, body)
    assert all(isinstance(result, CommMismatchError) for result in results)
    assert "table 0" in str(results[0])
    same = run_ranks(2, lambda group: dispatcher(group, parse(table_text(), "same")))
    assert all(isinstance(result, Dispatcher) for result in same)


def test_debug_compares_the_calls_before_they_are_made():
    def body(group):
        group.settings = Settings(debug=True)
        d = dispatcher(group)
        same = torch.zeros(4)
        d.run("all_reduce", same, same)
        other = torch.zeros(4 + group.rank)
        try:
            d.run("all_reduce", other, other)
        except CommMismatchError as error:
            return str(error), d.live[0].calls

    for text, calls in run_ranks(2, body):
        assert "all_reduce of [4] float32" in text
        assert "all_reduce of [5] float32" in text
        assert len(calls) == 1, "the call that differs was not made"
