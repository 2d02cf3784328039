"""Train the byte-level model that ships in checkpoint/ on Python's own standard library.

    python -m scripts.tp_llama.train --minutes 45

Every sequence starts at the beginning of a line, after a bos token, so that a prompt such as
``def main(`` looks like what the model has seen. The run is seeded. Its learning rate follows
the number of steps, or the clock where that is further on, so that a run on a slow machine ends
in its time with a finished schedule; the curve records which rate was used at every point.
Stopped at any time, it goes on from the last state with ``--resume``.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .train_export import BOS, EOS, export
from .train_model import DenseLlama, Shape

HERE = Path(__file__).parent
Model = Callable[[Tensor], Tensor]  # tokens to logits; DenseLlama, compiled or not
# Not source that somebody writes: tests, tables made by programs, copies of other projects.
SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
SKIPPED |= {"encodings", "pydoc_data", "lib2to3", "_bundled"}
VALIDATION_EVERY_NTH_FILE = 40


def source_files(root: Path) -> list[Path]:
    found = []
    for directory, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - SKIPPED)
        found += [Path(directory) / f for f in sorted(files) if f.endswith(".py")]
    return [path for path in found if not path.name.startswith("_sysconfigdata")]


class Corpus:
    """Bytes of many files, each between bos and eos, and where their lines start."""

    def __init__(self, paths: list[Path]) -> None:
        tokens: list[Tensor] = []
        for path in paths:
            data = torch.frombuffer(bytearray(path.read_bytes() or b"\n"), dtype=torch.uint8)
            tokens += [torch.tensor([BOS]), data.to(torch.int64), torch.tensor([EOS])]
        self.tokens = torch.cat(tokens).to(torch.int16)
        previous, current = self.tokens[:-1], self.tokens[1:]
        is_start = ((previous == ord("\n")) | (previous == BOS)) & (current != EOS)
        starts = is_start.nonzero().flatten() + 1
        blank = torch.tensor([ord(" "), ord("\n"), ord("#")], dtype=torch.int16)
        self.starts = starts
        self.outer_starts = starts[~torch.isin(self.tokens[starts], blank)]

    def batch(self, size: int, length: int, rng: torch.Generator) -> Tensor:
        """``[size, length + 1]``: bos, then the text from the start of a line on.

        One half starts at any line, the other at one that is not indented.
        """
        half = size // 2
        rows = []
        for starts, count in ((self.starts, size - half), (self.outer_starts, half)):
            usable = starts[starts < len(self.tokens) - length]
            chosen = usable[torch.randint(len(usable), (count,), generator=rng)]
            rows.append(self.tokens[chosen[:, None] + torch.arange(length)])
        bos = torch.full((size, 1), BOS, dtype=torch.int64)
        return torch.cat((bos, torch.cat(rows).to(torch.int64)), dim=1)


def loss_of(model: Model, batch: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: Model, batches: list[Tensor]) -> float:
    return sum(loss_of(model, batch).item() for batch in batches) / len(batches)


def optimizers(model: DenseLlama, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    inner = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    outer = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    return [
        torch.optim.Muon(inner, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate_factor(progress: float, step: int) -> float:
    """Warm up for 100 steps, hold, then fall linearly to zero over the last 60 %."""
    return min(1.0, (step + 1) / 100, max(0.0, (1.0 - progress) / 0.6))


class Run:
    """The state of one training run: everything that --resume needs."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.shape = Shape()
        self.model = DenseLlama(self.shape)
        self.optimizers = optimizers(self.model, options.rate)
        self.rng = torch.Generator().manual_seed(options.seed)
        self.step = 0
        self.seconds = 0.0
        self.curve: list[dict[str, float]] = []

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng": self.rng.get_state(),
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
        }
        path = Path(self.options.state)
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def resume(self) -> None:
        state = torch.load(self.options.state, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.rng.set_state(state["rng"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.curve = state["curve"]

    def progress(self) -> float:
        """0 to 1: by the steps, or by the clock where that is further on."""
        return max(self.step / self.options.steps, self.seconds / (60 * self.options.minutes))

    def train_step(
        self, model: Callable[[Tensor], Tensor], corpus: Corpus, progress: float
    ) -> float:
        rate = self.options.rate * rate_factor(progress, self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
        loss = loss_of(model, corpus.batch(self.options.batch, self.shape.context, self.rng))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        return loss.item()


def train(run: Run, training: Corpus, held_out: list[Tensor]) -> None:
    options = run.options
    model = torch.compile(run.model) if options.compile else run.model
    began = time.monotonic() - run.seconds
    losses: list[float] = []
    while (progress := run.progress()) < 1.0:
        losses.append(run.train_step(model, training, progress))
        run.seconds = time.monotonic() - began
        progress = run.progress()
        if run.step % options.report_every == 0 or progress >= 1.0:
            point = {
                "step": run.step,
                "seconds": round(run.seconds, 1),
                "tokens": run.step * options.batch * run.shape.context,
                "rate": run.optimizers[0].param_groups[0]["lr"],
                "training_loss": sum(losses) / len(losses),
                "validation_loss": validation_loss(model, held_out),
            }
            losses = []
            run.curve.append(point)
            print("  ".join(f"{name} {value:.5g}" for name, value in point.items()), flush=True)
            run.save()


def write_curve(curve: list[dict[str, float]], directory: Path) -> None:
    with (directory / "loss.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(curve[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: f"{value:.6g}" for name, value in p.items()} for p in curve)
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: loss.png is not drawn", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    for name in ("training_loss", "validation_loss"):
        axes.plot([p["tokens"] / 1e6 for p in curve], [p[name] for p in curve], label=name)
    axes.set_xlabel("million bytes seen")
    axes.set_ylabel("loss, nats per byte")
    axes.set_ylim(0.6, 2.2)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(directory / "loss.png", dpi=100)


def write_card(run: Run, directory: Path, files: int, corpus_bytes: int) -> None:
    last, parameters = run.curve[-1], sum(p.numel() for p in run.model.parameters())
    shape = ", ".join(f"{name} {value}" for name, value in asdict(run.shape).items())
    arguments = " ".join(
        f"--{name} {getattr(run.options, name)}"
        for name in ("steps", "minutes", "batch", "rate", "seed")
    )
    data = f"{files} files, {corpus_bytes / 1e6:.2f} MB"
    seen = f"{run.options.batch} x {run.shape.context} bytes, {last['tokens'] / 1e6:.1f} M in all"
    ended = "all" if run.step >= run.options.steps else "the clock ended the run and its schedule"
    machine = f"{torch.get_num_threads()} threads, bf16 autocast, torch {torch.__version__}"
    (directory / "README.md").write_text(
        f"""# A byte-level Llama of {parameters / 1e6:.2f} million parameters

Trained on the Python source of Python {platform.python_version()}'s standard library, for the
tensor-parallel example job. It writes text that looks like Python; it knows nothing.

| | |
|---|---|
| command | `python -m scripts.tp_llama.train {arguments}` |
| data | {data}; tests, codec tables and copied projects left out |
| held out | every {VALIDATION_EVERY_NTH_FILE}th file |
| shape | {shape} |
| vocabulary | 256 bytes, bos {BOS}, eos {EOS}, the rest unused |
| steps | {run.step} of {seen}; {ended} |
| time | {run.seconds / 60:.0f} minutes, {machine} |
| training loss | {last["training_loss"]:.3f} nats per byte |
| validation loss | {last["validation_loss"]:.3f} nats per byte |

Tensors are bf16. The curve is in loss.csv and loss.png. The standard library is under the PSF
licence; the weights were made from it and are distributed with this repository's licence.
""",
        encoding="utf-8",
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.tp_llama.train")
    parser.add_argument("--output", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--state", default="tp_llama_train.pt", help="for --resume")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report-every", type=int, default=200)
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    run = Run(options)
    if options.resume:
        run.resume()

    paths = source_files(Path(sysconfig.get_paths()["stdlib"]))
    held_out = Corpus(paths[::VALIDATION_EVERY_NTH_FILE])
    training = Corpus([p for i, p in enumerate(paths) if i % VALIDATION_EVERY_NTH_FILE])
    fixed = torch.Generator().manual_seed(0)
    batches = [held_out.batch(options.batch, run.shape.context, fixed) for _ in range(8)]
    corpus_bytes = len(training.tokens) + len(held_out.tokens) - 2 * len(paths)
    print(f"{len(paths)} files, {corpus_bytes} bytes", flush=True)

    train(run, training, batches)
    export(run.model, run.shape, options.output)
    write_curve(run.curve, options.output)
    write_card(run, options.output, len(paths), corpus_bytes)


if __name__ == "__main__":
    main()
