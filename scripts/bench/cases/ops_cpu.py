"""Times every kvcache op on the CPU beside plain torch and torch.compile of it, and beside a copy.

At 1, 64 and 4096 tokens, in bf16, fp32 and fp16. Results are checked before they are timed. The
four are timed in turns, many rounds of each, so that what else runs on the machine hits all of them
alike; medians over the rounds are shown, of times and of the ratios within each round.

An op is bound by memory where its own pace, with all it touches in the caches of a core, is above
the rate of the copy; one that is not is held against that pace. The pace is measured on one thread:
the bytes of some tokens more over the time of some tokens more, times the number of threads.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch

from communicators.cli.bench.record import Record, Row

from ..ops.case import F16, Case
from ..ops.cpu import cases
from ..ops.plain import BF16, F32

OURS = ("ours",)
DTYPES = {"bf16": BF16, "fp32": F32, "fp16": F16}
TOKENS = (1, 64, 4096)
SHARE = 0.8  # of the copy rate that a memory-bound op must reach, at the largest number of tokens
CACHED = 256 << 10  # bytes that calls which find all in the caches of a core are to move
Run = Callable[[], Any]


def seconds(run: Run, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def in_turns(runs: dict[str, Run], rounds: int, least: float) -> dict[str, list[float]]:
    """us a call of each, round by round; a turn of the first lasts about ``least`` seconds.

    A turn begins with three calls that are not timed (fewer of what takes long) and has as many
    timed ones as the others'. Otherwise each would find in the caches what those before it left
    there, and not what its own calls do: with tensors of about the size of the caches that alone
    would decide who is faster.
    """
    warm_up = {name: min(3, int(0.1 / seconds(run, 1))) for name, run in runs.items()}
    first = next(iter(runs))
    calls = 1
    if warm_up[first] > 0:
        seconds(runs[first], 3)
        calls = max(1, min(2000, int(least / max(seconds(runs[first], 2), 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            for _ in range(warm_up[name]):
                run()
            times[name].append(seconds(run, calls) * 1e6)
    return times


def nth_case(i: int, dtype: torch.dtype, tokens: int) -> Case:
    return next(islice(cases(tokens, dtype), i, None))


def pace(build: Callable[[int], Case], moved: float, options: argparse.Namespace) -> float:
    """Bytes a us that the threads would move if the caches of each held all; moved: of a token."""
    many = max(1, min(64, int(CACHED / moved / 16))) * 16
    torch.set_num_threads(1)
    some = {n: build(n) for n in (1, many)}
    runs: dict[str, Run] = {str(n): partial(c.ours, **c.tensors) for n, c in some.items()}
    times = in_turns(runs, options.rounds, max(options.seconds, 0.001))
    torch.set_num_threads(options.threads)
    us = {n: statistics.median(times[str(n)]) for n in some}
    return options.threads * (some[many].moved - some[1].moved) / (us[many] - us[1])


def row_of(case: Case, tokens: int, us: dict[str, list[float]], pace_of: Run, copied: int) -> Row:
    """us of ours and of the peers, and medians of their ratios.

    Ratios are taken within a round: the speed of a machine may change between rounds, and then
    falls on all of a round alike.
    """

    def times_ours(name: str) -> float:
        return statistics.median(t / o for t, o in zip(us[name], us["ours"], strict=True))

    dtype = str(case.dtype).removeprefix("torch.")
    values = {name: statistics.median(times) for name, times in us.items() if name != "copy"}
    faster = min(times_ours(name) for name in ("torch", "compile") if name in us)
    notes: dict[str, Any] = {"times": faster}
    found = ["slower"] if faster < 1 else []
    if "copy" in us:
        share = times_ours("copy") * case.moved / copied
        notes["of copy"] = f"{share:.0%}"
        if share < SHARE:
            of_pace = case.moved / values["ours"] / pace_of()
            notes["of pace"] = f"{of_pace:.0%}"
            if of_pace <= share:  # its pace is above the copy's
                found.append(f"under {SHARE:.0%} of copy")
            elif of_pace < SHARE:
                found.append(f"under {SHARE:.0%} of its pace")
    notes["verdict"] = ", ".join(found)
    name = f"{case.op} {case.variant}".strip()
    return Row({"op": name, "tokens": tokens, "dtype": dtype}, values, notes=notes)


def check(case: Case, theirs: Callable[[], object], name: str) -> None:
    """The two leave the same behind, from the same beginning."""
    given = {k: v for k, v in (case.other or case.tensors).items() if isinstance(v, torch.Tensor)}
    given.update({k: v for k, v in case.tensors.items() if isinstance(v, torch.Tensor)})
    begin = {k: v.clone() for k, v in given.items()}
    case.ours(**case.tensors)
    expected = {k: given[k].clone() for k in case.written}
    for k, v in given.items():
        v.copy_(begin[k])
    returned = theirs()
    for k in case.written:
        got = returned if returned is not None and k == case.written[0] else given[k]
        assert isinstance(got, torch.Tensor)
        torch.testing.assert_close(
            got,
            expected[k],
            rtol=case.tolerance,
            atol=case.tolerance,
            msg=partial("{} {} and {} differ in {}: {}".format, case.op, case.variant, name, k),
        )


def compiled(case: Case) -> Callable[..., object]:
    """torch.compile of the plain function, whose result goes where the op's does."""
    target = case.written[0]

    def into(tensors: dict[str, object]) -> None:
        result = case.plain(**tensors)
        if result is not None:
            tensors[target].copy_(result)  # type: ignore[attr-defined]

    torch._dynamo.reset()
    return torch.compile(into, dynamic=False)


def measure(
    build: Callable[[int], Case],
    case: Case,
    tokens: int,
    options: argparse.Namespace,
    copy: Run,
    copied: int,
) -> Row:
    theirs = case.other or case.tensors
    runs: dict[str, Run] = {
        "ours": lambda: case.ours(**case.tensors),
        "torch": lambda: case.plain(**theirs),
    }
    check(case, runs["torch"], "plain torch")
    if not options.no_compile:
        function = compiled(case)
        try:
            function(theirs)
        except torch._inductor.exc.InductorError as error:
            print(f"{case.op} {case.variant}: inductor fails: {str(error).splitlines()[0]}")
        else:
            runs["compile"] = lambda: function(theirs)
            check(case, runs["compile"], "torch.compile")
    if case.memory_bound and tokens == max(TOKENS):
        runs["copy"] = copy
    times = in_turns(runs, options.rounds, options.seconds)
    return row_of(case, tokens, times, lambda: pace(build, case.moved / tokens, options), copied)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=15)
    add("--seconds", type=float, default=0.004, help="of one turn, at least a call")
    add("--only", default="", help="ops whose name contains this")
    add("--tokens", type=int, nargs="*", default=TOKENS, choices=TOKENS)
    add("--dtype", nargs="*", default=list(DTYPES), choices=list(DTYPES))
    add("--no-compile", action="store_true", help="leave torch.compile out")


def rows(options: argparse.Namespace, facts: dict[str, Any]) -> Iterator[Row]:
    torch.set_num_threads(options.threads)
    # 64 MB each: far more than the caches hold.
    source, target = torch.ones(1 << 26, dtype=torch.uint8), torch.zeros(1 << 26, dtype=torch.uint8)
    copied = 2 * source.numel()
    copy = lambda: target.copy_(source)  # noqa: E731
    rate = copied / statistics.median(in_turns({"copy": copy}, 15, 0.0)["copy"]) / 1e3
    facts.update({"threads": options.threads, "copy": f"{rate:.1f} GB/s"})
    for name in options.dtype:
        for n in options.tokens:
            torch.manual_seed(0)
            for i, case in enumerate(cases(n, DTYPES[name])):
                if options.only in case.op:
                    build = partial(nth_case, i, DTYPES[name])
                    yield measure(build, case, n, options, copy, copied)
            gc.collect()


def summary(record: Record) -> str:
    verdicts = [row.notes["verdict"] for row in record.rows]
    return (
        f"{len(verdicts)} rows: {sum('slower' in v for v in verdicts)} slower than a peer, "
        f"{sum('of copy' in v for v in verdicts)} bound by memory under {SHARE:.0%} of the copy, "
        f"{sum('of its pace' in v for v in verdicts)} others under {SHARE:.0%} of their pace"
    )
