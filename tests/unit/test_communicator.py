"""Opening a communicator: one rank's refusal or failure is every rank's refusal."""

import pytest
import torch

from communicators import Capability, Communicator, Refusal, RefusedError, Request
from tests.threads import run_ranks

CAPABILITY = Capability(frozenset({"all_reduce"}), frozenset({torch.float32}))


class Fake(Communicator):
    name = "fake"

    def __init__(self, group, fails_at=None, fails_on=0, **changes):
        self.fails_at, self.fails_on, self.changes = fails_at, fails_on, changes
        self.handles = None
        self.released = 0
        super().__init__(group, torch.device("cpu"))

    def _fails(self, step):
        return self.fails_at == step and self.group.rank == self.fails_on

    def capability(self):
        if self._fails("capability"):
            return Refusal("no such device")
        if self._fails("other"):
            return Capability(frozenset({"all_gather"}))
        return CAPABILITY

    def allocate(self):
        if self._fails("allocate"):
            raise OSError("no memory")
        return self.group.rank * 10

    def rendezvous(self, handles):
        if self._fails("rendezvous"):
            raise RuntimeError("cannot map")
        self.handles = handles

    def run(self, op, out, inp, root=0, by="sum", splits=None):
        self.require_live()

    def release(self):
        self.released += 1


def test_all_ranks_open_with_everybodys_handles():
    for communicator in run_ranks(3, Fake):
        assert communicator.refusal is None and not communicator.disabled
        assert communicator.handles == [0, 10, 20]
        assert communicator.capabilities == CAPABILITY


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ("capability", "rank 1: no such device"),
        ("allocate", "rank 1: allocation failed: no memory"),
        ("rendezvous", "rank 1: rendezvous failed: cannot map"),
        ("other", "capabilities differ between ranks"),
    ],
)
def test_a_failure_on_one_rank_refuses_on_all_with_its_reason(step, reason):
    for communicator in run_ranks(3, lambda group: Fake(group, step, 1)):
        assert reason in str(communicator.refusal)
        assert communicator.disabled
        assert communicator.capabilities is None
        assert communicator.released == (1 if step in ("allocate", "rendezvous") else 0)
        with pytest.raises(RefusedError, match="not in use on rank"):
            communicator.run("all_reduce", None, None)


def test_disabled_by_name():
    from communicators import Settings

    def body(group):
        group.settings = Settings(disable=("fake",))
        return Fake(group)

    assert str(run_ranks(2, body)[0].refusal) == "disabled by COMMUNICATORS_DISABLE"


def test_close_is_idempotent_and_final():
    (communicator,) = run_ranks(1, Fake)
    communicator.close()
    communicator.close()
    assert communicator.released == 1
    with pytest.raises(RefusedError, match="was closed on rank 0"):
        communicator.run("all_reduce", None, None)


@pytest.mark.parametrize(
    ("change", "request_", "reason"),
    [
        ({}, Request("gather", torch.float32, 64), "it does only all_reduce"),
        ({}, Request("all_reduce", torch.int8, 64), "it sums float32, not int8"),
        ({}, Request("all_reduce", torch.float32, 64, "capture"), "mode 'capture'"),
        ({"max_bytes": 32}, Request("all_reduce", torch.float32, 64), "more than its 32"),
        ({"multiple": 48}, Request("all_reduce", torch.float32, 64), "not a multiple of 48"),
    ],
)
def test_capability_says_why_not(change, request_, reason):
    from dataclasses import replace

    capability = replace(CAPABILITY, **change)
    assert reason in str(capability.refuses(request_))
    assert capability.refuses(Request("all_reduce", torch.float32, 0)) is None
