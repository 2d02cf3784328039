"""What bench_decode prints and writes: the table, the machine's facts, JSON."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from communicators.selection.opening import driver_version

from .tp_llama.config import LlamaConfig

ROOT = Path(__file__).parents[1]


def commit() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def facts(
    options: argparse.Namespace, config: LlamaConfig, tp: Any, alone: str, graph: bool
) -> dict[str, Any]:
    """Everything that the rows depend on. Collective."""
    on_gpu = tp.device.type == "cuda"
    name = torch.cuda.get_device_name(tp.device) if on_gpu else f"CPU {platform.machine()}"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "devices": tp.group.gather_objects("devices", name),
        "driver": driver_version(tp.device),
        "cpus": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
        "commit": commit(),
        "command": shlex.join(["scripts/bench_decode", *sys.argv[1:]]),
        "alone": alone,
        "graph": graph,
        "model": {
            key: getattr(config, key)
            for key in (
                "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
                "head_dim", "vocab_size", "num_hidden_layers",
            )
        },
        "dtype": options.dtype,
        "context": options.context,
        "rounds": options.rounds,
        "replays": options.replays,
    }  # fmt: skip


def headline(about: dict[str, Any]) -> str:
    model, devices = about["model"], about["devices"]
    nccl = f", NCCL {about['nccl']}" if about["nccl"] else ""
    return (
        f"{len(devices)} x {devices[0]}, driver {about['driver']}, torch {about['torch']}{nccl}, "
        f"commit {about['commit']}, {about['date']}. TP {len(devices)}, {about['dtype']}, hidden "
        f"{model['hidden_size']}, MLP {model['intermediate_size']}, heads "
        f"{model['num_attention_heads']}/{model['num_key_value_heads']} of {model['head_dim']}, "
        f"vocabulary {model['vocab_size']}, {model['num_hidden_layers']} layers, "
        f"{about['context']} tokens of context, {'CUDA graph' if about['graph'] else 'eager'}, "
        f"median of {about['rounds'] * about['replays']} steps."
    )


def table(about: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    alone = about["alone"]
    return [
        f"| batch | {alone} alone, us/step | dispatch, us/step | without collectives, us/step "
        f"| collectives: {alone} alone, us | collectives: dispatch, us | step: {alone} / dispatch "
        f"| dispatch, tokens/s | logits off by |",
        "|---|---|---|---|---|---|---|---|---|",
        *(table_line(alone, row) for row in rows),
    ]


def table_line(alone: str, row: dict[str, Any]) -> str:
    peer, ours, without = (row["us"][n]["median"] for n in (alone, "dispatch", "without"))
    return (
        f"| {row['batch']} | {peer:.1f} | {ours:.1f} | {without:.1f} | {peer - without:.1f} | "
        f"{ours - without:.1f} | {peer / ours:.3f} | {row['batch'] / ours * 1e6:.0f} | "
        f"{row['error']:.2g} |"
    )


def choice_lines(row: dict[str, Any]) -> list[str]:
    return [
        f"batch {row['batch']}, all-reduces of {row['all_reduce_bytes']} bytes, {name}: "
        f"{communicator}, {reason}"
        for name, (communicator, reason) in row["chosen"].items()
    ]


def show_row(about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Print the last row; the head of the table before the first one."""
    *head, line = table(about, rows[-1:])
    if len(rows) == 1:
        print(headline(about), *head, sep="\n")
    spread = "; ".join(
        f"{name} {at['p10']:.1f} to {at['p90']:.1f}" for name, at in rows[-1]["us"].items()
    )
    print(line, *choice_lines(rows[-1]), f"10th to 90th percentile, us: {spread}", sep="\n")
    sys.stdout.flush()


def write(
    about: dict[str, Any], rows: list[dict[str, Any]], options: argparse.Namespace, text: str
) -> None:
    """The files that were asked for."""
    if options.json:
        Path(options.json).write_text(json.dumps({"facts": about, "rows": rows}, indent=1) + "\n")
    if options.markdown:
        lines = [
            f"# Decode step: {about['alone']} alone and our dispatch",
            "",
            f"Written by `{about['command']}`: {headline(about)}",
            "",
            text.strip(),
            "",
            "A step is one token of every sequence, so us/step is the time a token.",
            "",
            *table(about, rows),
            "",
            *(f"- {line}" for row in rows for line in choice_lines(row)),
        ]
        Path(options.markdown).write_text("\n".join(lines) + "\n")
