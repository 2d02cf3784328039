"""The quantized all-reduce beside the exact one, us a call in a CUDA graph.

communicators/selection/timing.py says how they are timed.

torchrun --nproc-per-node 2 scripts/bench_quick_all_reduce.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from communicators import Group
from communicators.backends.custom_all_reduce import CustomAllreduce
from communicators.backends.quick import codecs as quick_codecs
from communicators.backends.quick.quick_all_reduce import QuickAllReduce
from communicators.bindings.quick_ar import CODECS
from communicators.selection.timing import Timer

SIZES = [1 << shift for shift in range(20, 29)]


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    group = Group.of(None)
    exact = CustomAllreduce(group, device)
    quick = {codec: QuickAllReduce(group, device, codec, least_bytes=0) for codec in CODECS}
    for communicator in (exact, *quick.values()):
        assert communicator.refusal is None, communicator.refusal
    tiny = torch.zeros(8, device=device)
    timer = Timer(group, device, lambda: exact.all_reduce(tiny))
    check(group, device, quick)
    if rank == 0:
        print(f"| size | exact | {' | '.join(f'{c}, and of exact' for c in CODECS)} |")
        print("|---" * (2 + len(CODECS)) + "|")
    for nbytes in SIZES:
        x = torch.randn(nbytes // 2, device=device).bfloat16()
        out = torch.empty_like(x)
        base = timer.graph_us(lambda: exact.all_reduce(x, out=out), nbytes)  # noqa: B023
        cells = []
        for codec in CODECS:
            call = quick[codec].quick_all_reduce
            us = timer.graph_us(lambda: call(x, out=out), nbytes)  # noqa: B023
            quick[codec].check()
            cells.append(f"{us:.1f}, {us / base:.2f}")
        if rank == 0:
            print(f"| {nbytes >> 20} MB | {base:.1f} | {' | '.join(cells)} |", flush=True)
    dist.destroy_process_group()


def check(group: Group, device: torch.device, quick: dict[str, QuickAllReduce]) -> None:
    """Bits of the model before anything is timed."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1_500_000, generator=generator).bfloat16() for _ in group.ranks]
    inputs = [x.to(device) for x in drawn]
    for codec, communicator in quick.items():
        out = communicator.quick_all_reduce(inputs[group.rank])
        assert torch.equal(out, quick_codecs.all_reduce(inputs, codec)), codec


if __name__ == "__main__":
    main()
