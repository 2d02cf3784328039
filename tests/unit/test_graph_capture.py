"""What is captured in graphs is compared across the ranks of every open group."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from communicators import Capability, CommMismatchError, CommTimeoutError, Group, parallel_state
from communicators.base import OPS, Communicator
from communicators.selection.dispatcher import Dispatcher
from tests.threads import run_ranks


class Nothing(Communicator):
    """Takes every call, and does nothing."""

    name = "nothing"

    def capability(self) -> Capability:
        return Capability(frozenset(OPS), modes=frozenset({"eager", "capture"}))

    def run(self, op: str, out: Any, inp: Any, root: int = 0, *_: Any) -> None:
        return None


def _run(
    monkeypatch: pytest.MonkeyPatch, body: Callable[[Dispatcher, int], Any], timeout_s: float = 5
) -> list[Any]:
    """body(dispatcher, rank) on two ranks whose current streams are being captured."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    def rank(group: Group) -> Any:
        device = torch.device("cpu")
        dispatcher = Dispatcher(group, device, [Nothing(group, device)])
        dispatcher._on_cuda = True
        return body(dispatcher, group.rank)

    return run_ranks(2, rank, timeout_s)


def _calls(d: Dispatcher, *calls: tuple[str, int]) -> None:
    for op, count in calls:
        x = torch.zeros(count)
        d.run(op, x, None if op == "recv" else x)


@pytest.mark.parametrize("outside", [False, True])
def test_the_same_calls_pass(monkeypatch: pytest.MonkeyPatch, outside: bool) -> None:
    def body(d: Dispatcher, rank: int) -> str:
        if outside:
            _calls(d, ("all_gather", 3))
        for _ in range(2):  # many graphs in one scope, and many scopes
            with d.capture():
                _calls(d, ("all_reduce", 8), ("all_reduce", 8), ("broadcast", 2))
                _calls(d, ("send", 1) if rank else ("recv", 1))  # the two ends of a pipeline
                _calls(d, ("all_reduce", 8))
        return "passed"

    assert _run(monkeypatch, body) == ["passed"] * 2


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        ([("all_reduce", 8)], [], "1 x all_reduce of 32 bytes of float32 .* 0 x no call"),
        ([("all_reduce", 8)], [("all_reduce", 8)] * 3, "1 x all_reduce .* 3 x all_reduce"),
        ([("all_reduce", 8)], [("all_reduce", 9)], "of 32 bytes .* of 36 bytes"),
        ([("all_gather", 8)], [("reduce_scatter", 8)], "x all_gather .* x reduce_scatter"),
        (
            [("gather", 8), ("broadcast", 8)], [("broadcast", 8), ("gather", 8)],
            "x gather .* x broadcast",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("outside", [False, True])
def test_other_calls_are_an_error_of_all_ranks(
    monkeypatch: pytest.MonkeyPatch, first: Any, second: Any, text: str, outside: bool
) -> None:
    def body(d: Dispatcher, rank: int) -> str:
        mine = second if rank else first
        if outside:
            _calls(d, *mine)
        with pytest.raises(CommMismatchError) as caught, d.capture():
            if not outside:
                _calls(d, *mine)
        with d.capture():  # it is over with them
            _calls(d, ("all_reduce", 1))
        return str(caught.value)

    error, other = _run(monkeypatch, body)
    with pytest.raises(ValueError, match=text):
        raise ValueError(error)
    assert "rank 0" in other and "rank 1" in other


def test_a_capture_that_failed_is_compared_with_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(d: Dispatcher, rank: int) -> str:
        if rank == 0:
            with pytest.raises(ZeroDivisionError), d.capture():
                _calls(d, ("all_reduce", 8))
                raise ZeroDivisionError
        with d.capture():
            _calls(d, ("all_reduce", 4))
        return "passed"

    assert _run(monkeypatch, body) == ["passed"] * 2


def test_a_rank_that_does_not_come_is_named_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(d: Dispatcher, rank: int) -> None:
        if rank == 0:
            with d.capture():
                _calls(d, ("all_reduce", 8))

    error, _ = _run(monkeypatch, body, timeout_s=0.5)
    assert isinstance(error, CommTimeoutError) and "for rank 1 of 2" in str(error)


def test_graph_capture_enters_every_open_group(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    @contextlib.contextmanager
    def scope(name: str) -> Iterator[None]:
        log.append(f"enter {name}")
        yield
        log.append(f"leave {name}")

    names = ["world", "tp", "pp", "dp", "the user's own"]
    groups = {
        name: SimpleNamespace(device=torch.device("cpu"), capture=lambda name=name: scope(name))
        for name in names
    }
    monkeypatch.setattr(parallel_state, "OPEN_GROUPS", groups)
    monkeypatch.setattr(parallel_state, "get_world_group", lambda: groups["world"])
    with parallel_state.graph_capture() as context:
        assert context.stream is None
        assert log == [f"enter {name}" for name in names]
    # In one order on all ranks, and that of their opening, so that groups do not wait in a circle.
    assert log[len(names) :] == [f"leave {name}" for name in reversed(names)]
