"""Run the same prompts at several tensor-parallel sizes and compare the greedy tokens."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from .config import LlamaConfig
from .errors import CheckpointError, JobError
from .launch import MODULE, environment
from .options import VERIFY_PROMPTS, device_kind, prompts, say, world_size
from .partition import Partition

SIZES = (1, 2, 4)


def possible_sizes(options: argparse.Namespace) -> list[int]:
    """The sizes that the checkpoint and the machine permit; says why where one is left out."""
    device = device_kind(options.device)
    config = LlamaConfig.from_directory(options.model)
    possible = []
    for size in SIZES:
        try:
            Partition.of(config, 0, size)
            possible.append(world_size(size, device))
        except (CheckpointError, JobError) as error:
            say(f"tp {size}: left out; {error}")
    return possible


def tokens_at(size: int, options: argparse.Namespace, texts: list[str]) -> list[list[int]]:
    """The new tokens of each prompt at this size, from a run of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.json"
        command = [sys.executable, "-m", MODULE, "--tp", str(size), "--tokens-file", str(path)]
        command += [f"--prompt={text}" for text in texts]
        # fp32: in bf16 the order of the partial sums may move a logit by more than a close call.
        dtype = "float32" if options.dtype == "auto" else options.dtype
        for name, value in (
            ("max-new-tokens", options.max_new_tokens),
            ("model", options.model),
            ("dtype", dtype),
            ("device", options.device),
            ("block-size", options.block_size),
            ("kv-cache-dtype", options.kv_cache_dtype),
        ):
            command += [f"--{name}={value}"]
        command += [] if options.graph else ["--no-graph"]
        with environment(size):
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise JobError(f"the run at tp {size} failed:\n{done.stderr.strip()}")
        say("\n".join(f"tp {size}: {line}" for line in done.stderr.splitlines()))
        tokens: list[list[int]] = json.loads(path.read_text())
        return tokens


def difference(expected: list[list[int]], got: list[list[int]]) -> str | None:
    """Where two runs part, as a sentence; None if nowhere."""
    for prompt, (a, b) in enumerate(zip(expected, got, strict=True)):
        for position, (x, y) in enumerate(zip(a, b, strict=False)):
            if x != y:
                return f"prompt {prompt}: new token {position} is {y} where {x} is expected"
        if len(a) != len(b):
            return f"prompt {prompt}: {len(b)} new tokens where {len(a)} are expected"
    return None


def verify(options: argparse.Namespace) -> int:
    """Exit code: 0 all sizes agree, 1 they do not, 2 there is nothing to compare."""
    if options.temperature != 0.0:
        raise JobError(f"--verify compares greedy tokens; got --temperature {options.temperature}")
    sizes = possible_sizes(options)
    if len(sizes) < 2:
        say("verify: NOTHING TO COMPARE: fewer than two sizes are possible here")
        return 2
    texts = prompts(options, VERIFY_PROMPTS)
    results = {size: tokens_at(size, options, texts) for size in sizes}
    first = sizes[0]
    parted = {size: difference(results[first], results[size]) for size in sizes[1:]}
    for size, where in parted.items():
        if where:
            say(f"verify: tp {size} differs from tp {first}: {where}")
    if any(parted.values()):
        say("verify: DIFFERENT")
        return 1
    count = sum(map(len, results[first]))
    say(
        f"verify: SAME: {count} greedy tokens of {len(texts)} prompts are equal at tp "
        f"{', '.join(map(str, sizes))}"
    )
    return 0
