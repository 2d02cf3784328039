"""Policy, tables and dispatcher: admitted, then measured, then the order of the list."""

import json

import pytest
import torch

from communicators import (
    Capability,
    CommMismatchError,
    CommunicatorError,
    Refusal,
    Request,
    Settings,
)
from communicators.base import Communicator
from communicators.dispatcher import Dispatcher
from communicators.errors import InvalidArgumentError, SettingsError
from communicators.policy import choose
from communicators.tables import EMPTY, load, parse
from tests.threads import run_ranks

SMALL = Capability(frozenset({"all_reduce"}), max_bytes=1024)
ALL = Capability(frozenset({"all_reduce", "all_gather"}), deterministic=False)
LIVE = [("small", SMALL), ("all", ALL)]


def table_text(**changes):
    row = {
        "op": "all_reduce", "dtype": "bfloat16", "mode": "eager", "up_to_bytes": 256,
        "communicator": "all", "us": {"all": 2.0, "small": 3.5},
    }  # fmt: skip
    data = {
        "machine": {"device": "Toy", "link": "NV1", "world_size": 2},
        "measured": {"date": "2026-01-01", "driver": "1", "commit": "abc", "command": "tune"},
        "rows": [row, {**row, "up_to_bytes": 512, "communicator": "small"}],
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        holder = data
        for key in parents:
            holder = holder[int(key) if key.isdigit() else key]
        holder[last] = value
    return json.dumps(data)


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
    choice = choose(request(64), LIVE, table)
    assert choice.reason == "measured fastest, 2 us (2 x Toy NV1, 2026-01-01)"
    assert str(choice.refused["small"]) == "measured 3.5 us against 2"


def test_admission_comes_before_measurement():
    table = parse(table_text(rows__1__up_to_bytes=1 << 20), "toy.json")
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


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rows__0__op": "sum"}, "row 0 has op 'sum'"),
        ({"rows__1__up_to_bytes": "big"}, "row 1 needs 'up_to_bytes'"),
        ({"machine__world_size": None}, "the machine"),
        ({"measured__commit": 7}, "needs 'commit'"),
        ({"rows": {}}, "needs 'rows'"),
    ],
)
def test_a_bad_table_is_named_with_its_row(changes, reason):
    with pytest.raises(SettingsError) as caught:
        parse(table_text(**changes), "toy.json")
    assert "toy.json" in str(caught.value)
    assert reason.replace("the machine", "machine") in str(caught.value)
    with pytest.raises(SettingsError, match="not JSON"):
        parse("{", "toy.json")


def test_tables_are_found_by_machine_shape(tmp_path):
    (tmp_path / "toy.json").write_text(table_text())
    assert load("Toy", "NV1", 2, [tmp_path]).machine["device"] == "Toy"
    assert load("Toy", "NV1", 4, [tmp_path]) is EMPTY
    assert load("Toy", "", 2, [tmp_path]) is EMPTY
    assert len(load("Toy", "NV1", 2, [tmp_path]).digest) == 16


def test_shipped_tables_are_valid():
    from pathlib import Path

    import communicators

    for path in (Path(communicators.__file__).parent / "tables").glob("*.json"):
        assert parse(path.read_text(), str(path)).rows


class Recording(Communicator):
    def __init__(self, group, name, capability):
        self.name = name
        self.mine = capability
        self.calls = []
        super().__init__(group, torch.device("cpu"))

    def capability(self):
        return self.mine

    def run(self, op, out, inp, root=0):
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
    assert "  reduce_scatter, gather, broadcast, send, recv; bfloat16, eager:" in text
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
