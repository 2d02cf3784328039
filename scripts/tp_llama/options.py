"""The command line of the job."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from .errors import JobError

DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
SHIPPED = Path(__file__).parent / "checkpoint"
REPEATABLE = "may be given several times: a batch"
DEFAULT_PROMPT = 'def read_file(path):\n    """'
VERIFY_PROMPTS = ("def main(", "import os\nimport ", "class Reader:\n    def __init__(self", "for ")


def parser() -> argparse.ArgumentParser:
    # fmt: off
    p = argparse.ArgumentParser(
        prog="python -m scripts.tp_llama",
        description="Tensor-parallel text generation with a Llama-family checkpoint. Starts its "
        "own ranks; under torchrun it uses the ranks that are there.",
    )
    p.add_argument("--tp", type=int, metavar="N", help="tensor-parallel ranks (default: 2)")
    p.add_argument("--prompt", action="append", default=[], metavar="TEXT", help=REPEATABLE)
    p.add_argument("--prompt-file", action="append", default=[], type=Path, metavar="FILE",
                   help=f"a file that is one prompt; {REPEATABLE}")
    p.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    p.add_argument("--top-p", type=float, default=1.0)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--model", type=Path, default=SHIPPED, metavar="DIR",
                   help="a Hugging Face directory (default: the small one shipped here)")
    p.add_argument("--dtype", choices=list(DTYPES), default="auto",
                   help="auto: bfloat16 on GPUs, float32 on CPUs and for --verify")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--block-size", type=int, default=16, choices=(8, 16, 32))
    p.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), default="auto")
    p.add_argument("--no-graph", dest="graph", action="store_false",
                   help="on GPUs: run the decode step as it is, not as a captured CUDA graph")
    p.add_argument("--verify", action="store_true",
                   help="run at tp 1, 2 and 4 and compare the greedy tokens")
    p.add_argument("--explain", action="store_true", help="print which communicators are used")
    p.add_argument("--tokens-file", type=Path, metavar="FILE",
                   help="also write the new token ids, as JSON")
    # fmt: on
    return p


def prompts(options: argparse.Namespace, default: tuple[str, ...] = (DEFAULT_PROMPT,)) -> list[str]:
    """The texts of --prompt, then of --prompt-file; the default where there are none."""
    texts = list(options.prompt)
    for path in options.prompt_file:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise JobError(f"--prompt-file {path}: cannot be read as UTF-8; {error}") from error
    return texts or list(default)


def device_kind(asked: str) -> str:
    """ "cpu" or "cuda"."""
    available = torch.cuda.is_available()
    if asked == "cuda" and not available:
        raise JobError("--device cuda: torch sees no GPU on this machine; accepted: cpu, auto")
    if asked == "auto":
        return "cuda" if available else "cpu"
    return asked


def world_size(asked: int | None, device: str) -> int:
    """How many ranks to start; raises JobError where the machine has too few GPUs."""
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    if asked is None:
        return min(2, gpus) if device == "cuda" else 2
    if asked < 1:
        raise JobError(f"--tp must be 1 or more; got {asked}")
    if device == "cuda" and asked > gpus:
        raise JobError(
            f"--tp {asked} needs {asked} GPUs; this machine has {gpus}. Accepted: --tp {gpus} or "
            f"fewer, or --device cpu"
        )
    return asked


def say(text: str) -> None:
    """A line for the person at the terminal; the generated text alone goes to stdout."""
    print(text, file=sys.stderr, flush=True)
