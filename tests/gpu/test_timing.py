"""The timer on one GPU, with kernels that spin for a known number of cycles."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from communicators import Group
from communicators.selection.timing import Timer, queued_us
from tests.threads import run_ranks

pytestmark = pytest.mark.gpu

if not torch.cuda.is_available():
    pytest.skip("no CUDA GPU", allow_module_level=True)

_CYCLES = 200_000  # 0.1 ms and more, beside which a launch is little


def spin(cycles: int) -> Callable[[], None]:
    return lambda: torch.cuda._sleep(cycles)


@pytest.mark.parametrize("how", ["graph", "eager", "queued", "after a producer"])
def test_twice_the_cycles_take_twice_the_time(how: str) -> None:
    aligned = [0]

    def align() -> None:
        aligned[0] += 1

    def body(group: Group) -> tuple[float, float]:
        device = torch.device("cuda", torch.cuda.current_device())
        timer = Timer(group, device, align)

        def us(cycles: int) -> float:
            call = spin(cycles)
            if how == "graph":
                return timer.graph_us(call, 256 << 20)
            if how == "eager":
                return timer.eager_us(call)
            if how == "queued":
                return queued_us(call, device, align)
            return timer.after_producer_us(call, spin(_CYCLES), 256 << 20)

        us(_CYCLES)  # the first one finds the clocks low
        return us(_CYCLES), us(2 * _CYCLES)

    ((once, twice),) = run_ranks(1, body, timeout_s=60)
    assert 20 < once < 2000
    assert 1.7 < twice / once < 2.3
    assert aligned[0] >= 3
