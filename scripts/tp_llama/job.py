"""What one rank does: load its part, generate, and on rank 0 print."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from communicators import CommunicatorError
from communicators import parallel_state as ps

from .agreement import AgreedError, together
from .errors import JobError
from .generate import Generation, Generator, Limits, check_lengths
from .loader import load
from .model import LlamaModel
from .options import DTYPES, device_kind, prompts, say
from .sampling import Sampling
from .text_output import TextOutput
from .timed_group import TimedGroup
from .tokenizer import Tokenizer, load_tokenizer


@contextmanager
def tensor_parallel_group(device: str, tp: int | None) -> Iterator[Any]:
    """The GroupCoordinator of the ranks that torchrun started."""
    world_size, local_rank = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    if tp is not None and tp != world_size:
        raise JobError(f"--tp {tp} was asked for and {world_size} ranks were started")
    index = f":{local_rank}" if device == "cuda" else ""
    ps.init_distributed_environment(device=f"{device}{index}")
    try:
        ps.initialize_model_parallel(tensor_model_parallel_size=world_size)
        yield ps.get_tp_group()
    finally:
        ps.destroy_model_parallel()
        ps.destroy_distributed_environment()


@dataclass(frozen=True)
class Request:
    """What rank 0 makes of the prompts; the same on all ranks after the broadcast."""

    prompts: list[list[int]]
    limits: Limits


def read_request(
    options: argparse.Namespace, tp: Any, eos: tuple[int, ...], context: int
) -> tuple[Request, Tokenizer | None]:
    """Tokenize on rank 0 and tell the others. The tokenizer is None on those. Collective."""

    def on_rank_0() -> tuple[Request, Tokenizer] | None:
        if tp.rank_in_group != 0:
            return None
        tokenizer = load_tokenizer(options.model)
        request = Request(
            [tokenizer.encode(text) for text in prompts(options)],
            Limits(options.max_new_tokens, eos),
        )
        check_lengths(request.prompts, request.limits, context)
        return request, tokenizer

    read = together(tp, on_rank_0)
    request = tp.broadcast_object(read[0] if read else None, src=0)
    return request, read[1] if read else None


def run(options: argparse.Namespace) -> None:
    """The whole job on this rank. Raises JobError or CommunicatorError."""
    device = device_kind(options.device)
    sampling = Sampling(options.temperature, options.top_p, options.seed)
    with tensor_parallel_group(device, options.tp) as group:
        try:
            run_in_group(options, group, sampling)
        except AgreedError as error:
            # Rank 0 speaks for all; the others wait, so that the launcher does not end it first.
            if group.rank_in_group == 0:
                say(f"error: {error}")
            group.barrier()
            raise


def run_in_group(options: argparse.Namespace, group: Any, sampling: Sampling) -> None:
    tp = TimedGroup(group)
    leads = tp.rank_in_group == 0
    began = time.perf_counter()
    config, part, weights = load(options.model, tp, DTYPES[options.dtype])
    dtype = weights.norm.dtype
    request, tokenizer = read_request(
        options, tp, config.eos_token_ids, config.max_position_embeddings
    )
    if leads:
        say(
            f"{options.model.name}: {config.parameters / 1e6:.2f} M parameters, tp "
            f"{tp.world_size} on {tp.device.type}, {str(dtype).removeprefix('torch.')}, loaded in "
            f"{time.perf_counter() - began:.2f} s"
        )
        if options.explain:
            say(group.explain())
    length = max(map(len, request.prompts)) + options.max_new_tokens
    model = LlamaModel(config, part, weights, tp, length)
    generator = Generator(model, dtype, options.block_size, options.kv_cache_dtype, options.graph)
    if not leads or tokenizer is None:
        generator(request.prompts, request.limits, sampling)
        return
    with TextOutput(tokenizer, request.prompts, config.eos_token_ids, sys.stdout) as output:
        result = generator(request.prompts, request.limits, sampling, output.put)
    report(result, options)


def report(result: Generation, options: argparse.Namespace) -> None:
    say(f"prefill: {result.prefill.summary()}")
    if result.capture_seconds is not None:
        say(f"graph:   the decode step captured in {result.capture_seconds:.3f} s")
    say(f"decode:  {result.decode.summary()}")
    if options.tokens_file:
        options.tokens_file.write_text(json.dumps(result.tokens) + "\n")


def main(options: argparse.Namespace) -> int:
    """Exit code: 0 done, 1 not done and said why, 130 interrupted."""
    try:
        run(options)
    except AgreedError:
        return 1
    except (JobError, CommunicatorError) as error:
        say(f"error on rank {os.environ.get('RANK', '?')}: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
