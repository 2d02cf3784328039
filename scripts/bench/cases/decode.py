"""A decode step of a tensor-parallel Llama with NCCL alone and with our dispatch.

Weights and KV cache are random, in the shapes of a real model (Llama-3-70B on GPUs). Each sequence
has `--context` tokens in a paged cache of shuffled blocks; a step takes one token more through
embedding, layers, norm and the rank's part of the logits, on a GPU as one CUDA graph. Choosing the
token is left out. Three variants share the weights and the cache and take turns in every round:

  NCCL        a group of its own in which every communicator but NCCL's is disabled (CPU: gloo)
  dispatch    the group as the library opens it
  without     the collectives left out, wrong on purpose: what the rest of the step costs

Before the first and after the last round the logits of NCCL and dispatch must be finite and equal
within a tolerance that `without` is far beyond. A step's time is the median over all replays, of
the slowest rank. "collectives" is a variant's time less that of `without`.
A step is one token of every sequence, so us/step is the time a token.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from communicators.base import Request
from communicators.cli.bench import driver, gpu, launch
from communicators.cli.bench.record import Row
from communicators.errors import CommunicatorError, InvalidArgumentError
from communicators.groups.coordinator import GroupCoordinator
from scripts.tp_llama.agreement import AgreedError, together
from scripts.tp_llama.config import LlamaConfig, RopeScaling
from scripts.tp_llama.decode_step import DecodeStep
from scripts.tp_llama.errors import JobError
from scripts.tp_llama.generate import DecodeBuffers
from scripts.tp_llama.job import tensor_parallel_group
from scripts.tp_llama.kv_cache import PagedKVCache, Sequence
from scripts.tp_llama.launch import environment
from scripts.tp_llama.model import LlamaModel
from scripts.tp_llama.options import device_kind, say
from scripts.tp_llama.partition import Partition
from scripts.tp_llama.random_weights import random_weights
from scripts.tp_llama.timed_group import TimedGroup

SHAPES = {
    "llama-3-70b": (8192, 28672, 64, 8, 128, 128256),
    "llama-3-8b": (4096, 14336, 32, 8, 128, 128256),
    "tiny": (256, 512, 8, 4, 32, 1000),
}
SHAPE_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
# What "alone" means on a device: the communicators that are left.
ALONE = {"cuda": ("NCCL", ("pynccl", "torch_distributed")), "cpu": ("gloo", ("torch_distributed",))}
DISPATCH, WITHOUT = "dispatch", "without"
BLOCK_SIZE = 16
OURS = (DISPATCH,)
WARM_UP_STEPS = 3  # at the start of each round


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    driver.add_ranks(parser, [2])
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--shape", choices=list(SHAPES),
        help="default: llama-3-70b on GPUs, tiny on CPUs; the next six change parts")
    for name in SHAPE_FIELDS:
        add(f"--{name.replace('_', '-')}", type=int, metavar="N")
    add("--layers", type=int, default=8)
    add("--batch", type=int, nargs="+", default=[1, 32], help="sequences")
    add("--context", type=int, default=1024, help="tokens in the cache of a sequence")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    add("--rounds", type=int, default=10)
    add("--replays", type=int, default=50, help="steps of a variant in a round")
    add("--no-graph", dest="graph", action="store_false",
        help="on GPUs: time the steps as the host issues them")
    add("--explain", action="store_true", help="print the dispatch of both groups")
    add("--timeout", type=float, default=3600.0, help="seconds that the ranks may take")
    # fmt: on


def model_config(options: argparse.Namespace, device: str) -> LlamaConfig:
    shape = options.shape or ("llama-3-70b" if device == "cuda" else "tiny")
    fields = dict(zip(SHAPE_FIELDS, SHAPES[shape], strict=True))
    fields |= {name: given for name in SHAPE_FIELDS if (given := getattr(options, name))}
    return LlamaConfig(
        **fields,
        num_hidden_layers=options.layers,
        max_position_embeddings=options.context + 1,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(),
        tie_word_embeddings=False,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        bos_token_id=None,
        eos_token_ids=(),
    )


class NoCollectives:
    """Stands in for a group: each rank keeps its own partial sums."""

    def __init__(self, group: GroupCoordinator) -> None:
        self.rank_in_group, self.world_size = group.rank_in_group, group.world_size
        self.device = group.device

    def all_reduce_(self, x: Tensor) -> Tensor:
        return x


def open_alone(tp: GroupCoordinator) -> tuple[str, GroupCoordinator]:
    """The name of the peer and a second group of the same ranks in which it is alone."""
    name, kept = ALONE[tp.device.type]
    others = (c.name for c in tp.dispatcher().live if c.name not in kept)
    disable = tuple(sorted({*tp.settings.disable, *others}))
    settings = dataclasses.replace(tp.settings, disable=disable)
    return name, GroupCoordinator(tp.ranks, tp.device, "tp_alone", settings)


def random_batch(
    config: LlamaConfig, part: Partition, batch: int, options: argparse.Namespace, tp: Any
) -> tuple[DecodeBuffers, PagedKVCache]:
    """Inputs for one token after `context` random ones; the same on all ranks but for the cache."""
    length = options.context + 1
    blocks = -(-length // BLOCK_SIZE)
    cache = PagedKVCache(
        config.num_hidden_layers, batch * blocks, BLOCK_SIZE, part.kv_heads, config.head_dim,
        getattr(torch, options.dtype), tp.device,
    )  # fmt: skip
    own = torch.Generator(tp.device).manual_seed(1000 + tp.rank_in_group)
    for layer in cache.layers:
        layer.key.normal_(generator=own)
        layer.value.normal_(generator=own)
    shared = torch.Generator().manual_seed(2000)
    tables = torch.randperm(batch * blocks, generator=shared).view(batch, blocks).tolist()
    sequences = [Sequence(table, length) for table in tables]
    block, offset = divmod(options.context, BLOCK_SIZE)
    buffers = DecodeBuffers(batch, blocks, tp.device)
    buffers.fill(
        torch.randint(config.vocab_size, (batch,), generator=shared),
        sequences,
        [sequence.blocks[block] * BLOCK_SIZE + offset for sequence in sequences],
        [False] * batch,
    )
    return buffers, cache


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def tolerance(config: LlamaConfig, dtype: torch.dtype) -> float:
    """Two correct orders of summing differ by roundings, at random, so they add up as a walk.

    Twice the machine's epsilon a sum: with 4 ranks under half of this is seen, and 2 ranks have
    only one order.
    """
    return 2 * torch.finfo(dtype).eps * (2 * config.num_hidden_layers + 1) ** 0.5


def check(steps: dict[str, DecodeStep], alone: str, allowed: float, tp: Any) -> float:
    """The relative error of dispatch against the peer; JobError on all ranks if it is wrong."""
    logits = {name: step().clone() for name, step in steps.items()}

    def compare() -> float:
        expected = logits[alone]
        for name in (alone, DISPATCH):
            if not logits[name].isfinite().all():
                raise JobError(f"the logits of {name} are not finite")
        error = relative_error(logits[DISPATCH], expected)
        if error > allowed:
            raise JobError(f"dispatch is {error:.3g} off {alone}; allowed is {allowed:.3g}")
        control = relative_error(logits[WITHOUT], expected)
        if not control > 4 * allowed:
            raise JobError(
                f"the check would not notice collectives that do nothing: without them the logits "
                f"are {control:.3g} off, and {allowed:.3g} is allowed"
            )
        return error

    return max(tp.group.gather_objects("error", together(tp, compare)))


def time_steps(step: DecodeStep, count: int, device: torch.device) -> list[float]:
    """Microseconds of each of `count` steps, back to back."""
    if device.type == "cpu":
        ends = [time.perf_counter()]
        for _ in range(count):
            step()
            ends.append(time.perf_counter())
        return [(b - a) * 1e6 for a, b in pairwise(ends)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) * 1e3 for a, b in pairwise(events)]


def time_variants(
    steps: dict[str, DecodeStep], tp: Any, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """For each variant the median, 10th and 90th percentile in us, of the slowest rank."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            tp.barrier()
            time_steps(step, WARM_UP_STEPS, tp.device)
            times[name] += time_steps(step, options.replays, tp.device)
    mine = {}
    for name, samples in times.items():
        tenths = statistics.quantiles(samples, n=10, method="inclusive")
        mine[name] = {"p10": tenths[0], "median": tenths[4], "p90": tenths[8]}
    every = tp.group.gather_objects("times", mine)
    return {
        name: max((rank[name] for rank in every), key=lambda at: at["median"]) for name in times
    }


@contextmanager
def prepared(steps: dict[str, DecodeStep], graph: bool) -> Iterator[None]:
    """Capture the steps where asked, and give the graphs back at the end."""
    with ExitStack() as stack:
        for step in steps.values():
            stack.enter_context(closing(step))
            if graph:
                step.capture()
        yield


@torch.inference_mode()
def steps_of(options: argparse.Namespace, tp: GroupCoordinator) -> Iterator[Row]:
    config, dtype = model_config(options, tp.device.type), getattr(torch, options.dtype)
    graph = options.graph and tp.device.type == "cuda"
    alone, peer = open_alone(tp)
    if options.explain and tp.rank_in_group == 0:
        say(f"{tp.explain()}\n{peer.explain()}")

    def make() -> tuple[Partition, Any]:
        part = Partition.of(config, tp.rank_in_group, tp.world_size)
        return part, random_weights(config, part, dtype, tp.device)

    part, weights = together(tp, make)
    models = {
        name: LlamaModel(config, part, weights, TimedGroup(group, timed=False), options.context + 1)
        for name, group in ((alone, peer), (DISPATCH, tp), (WITHOUT, NoCollectives(tp)))
    }
    for batch in options.batch:
        buffers, cache = random_batch(config, part, batch, options, tp)
        steps = {name: DecodeStep(models[name], buffers.inputs, cache) for name in models}
        with prepared(steps, graph):
            errors = [check(steps, alone, tolerance(config, dtype), tp)]
            us = time_variants(steps, tp, options)
            errors.append(check(steps, alone, tolerance(config, dtype), tp))
        nbytes = batch * config.hidden_size * dtype.itemsize
        request = Request("all_reduce", dtype, nbytes, "capture" if graph else "eager")
        medians = {name: at["median"] for name, at in us.items()}
        without = medians[WITHOUT]
        notes: dict[str, Any] = {
            f"collectives of {name}": medians[name] - without for name in (alone, DISPATCH)
        }
        for name, group in ((alone, peer), (DISPATCH, tp)):
            chosen, reason = dataclasses.astuple(group.dispatcher().select(request))[:2]
            notes[f"{name} chose"] = f"{chosen}, {reason}"
            at = us[name]
            notes[f"{name}, p10 to p90"] = f"{at['p10']:.1f} to {at['p90']:.1f}"
        notes["tokens/s"] = batch / medians[DISPATCH] * 1e6
        notes["logits off by"] = f"{max(errors):.2g}"
        key = {"batch": batch, "ranks": tp.world_size, "all-reduce of, bytes": nbytes}
        yield Row(key, medians, notes=notes)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """One rank."""
    try:
        with tensor_parallel_group(options.device, None) as tp:
            try:
                yield from steps_of(options, tp)
            except AgreedError as error:  # all ranks have it, and rank 0 says it
                tp.barrier()
                if tp.rank_in_group:
                    raise SystemExit(1) from error
                raise
    except JobError as error:
        raise CommunicatorError(str(error)) from error


def described(config: LlamaConfig, options: argparse.Namespace) -> str:
    graph = options.graph and options.device == "cuda"
    return (
        f"of hidden {config.hidden_size}, MLP {config.intermediate_size}, heads "
        f"{config.num_attention_heads}/{config.num_key_value_heads} of {config.head_dim}, "
        f"vocabulary {config.vocab_size}, {config.num_hidden_layers} layers, {options.dtype}, "
        f"{options.context} tokens of context, {'CUDA graph' if graph else 'eager'}, median of "
        f"{options.rounds * options.replays} steps"
    )


def rows(options: argparse.Namespace, facts: dict[str, Any]) -> Iterator[Row]:
    try:
        options.device = device_kind(options.device)
    except JobError as error:
        raise InvalidArgumentError(str(error)) from error
    facts["model"] = described(model_config(options, options.device), options)
    for ranks in options.ranks:
        if ranks < 2:
            raise InvalidArgumentError(
                f"collectives are compared, so 2 ranks or more are needed; got {ranks}"
            )
        if options.device == "cuda":
            gpu.require(ranks)
        with environment(ranks):
            yield from launch.measured(__name__, ranks, options, total=len(options.batch))
