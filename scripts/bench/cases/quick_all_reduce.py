"""The quantized all-reduce beside the exact one, us a call in a CUDA graph.

The bits of each codec are compared with the model's before anything is timed;
communicators/selection/timing.py says how the calls are.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from communicators.backends.custom_all_reduce import CustomAllreduce
from communicators.backends.quick import codecs as quick_codecs
from communicators.backends.quick.quick_all_reduce import QuickAllReduce
from communicators.bindings.collectives import CODECS
from communicators.cli.bench import driver, gpu, launch
from communicators.cli.bench.record import Row
from communicators.errors import CommunicatorError, RefusedError
from communicators.groups.group import Group
from communicators.selection.timing import Timer

SIZES = [1 << shift for shift in range(20, 29)]
OURS = ("exact", *CODECS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    driver.add_ranks(parser, [2])
    driver.add_collectives(parser, ["bfloat16"])


def rows(options: argparse.Namespace, facts: dict[str, Any]) -> Iterator[Row]:
    options.sizes = options.sizes or SIZES
    for world_size in options.ranks:
        gpu.require(world_size)
        total = len(options.sizes) * len(options.dtypes)
        yield from launch.measured(__name__, world_size, options, total=total)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """One rank."""
    dist.init_process_group("gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    group = Group.of(None)
    exact = CustomAllreduce(group, device)
    quick = {codec: QuickAllReduce(group, device, codec, least_bytes=0) for codec in CODECS}
    for communicator in (exact, *quick.values()):
        if communicator.refusal is not None:
            raise RefusedError(f"rank {group.rank}: {communicator.refusal}")
    tiny = torch.zeros(8, device=device)
    timer = Timer(group, device, lambda: exact.all_reduce(tiny))
    check(group, device, quick)
    for name in options.dtypes:
        dtype = getattr(torch, name)
        for nbytes in options.sizes:
            x = torch.randn(nbytes // dtype.itemsize, device=device).to(dtype)
            out = torch.empty_like(x)
            us = {"exact": timer.graph_us(lambda: exact.all_reduce(x, out=out), nbytes)}  # noqa: B023
            for codec in CODECS:
                call = quick[codec].quick_all_reduce
                us[codec] = timer.graph_us(lambda: call(x, out=out), nbytes)  # noqa: B023
                quick[codec].check()
            shares = {f"{codec} / exact": f"{us[codec] / us['exact']:.2f}" for codec in CODECS}
            key = {"op": "all_reduce", "dtype": name, "ranks": group.world_size, "bytes": nbytes}
            yield Row(key, us, notes=shares)
    dist.destroy_process_group()


def check(group: Group, device: torch.device, quick: dict[str, QuickAllReduce]) -> None:
    """Bits of the model before anything is timed."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1_500_000, generator=generator).bfloat16() for _ in group.ranks]
    inputs = [x.to(device) for x in drawn]
    for codec, communicator in quick.items():
        out = communicator.quick_all_reduce(inputs[group.rank])
        if not torch.equal(out, quick_codecs.all_reduce(inputs, codec)):
            raise CommunicatorError(f"rank {group.rank}: {codec} gives other bits than its model")
