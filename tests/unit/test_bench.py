"""`communicators bench` and scripts/bench: their figures' format, what they print and refuse."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from communicators import cli
from communicators.cli.bench import report
from communicators.cli.bench.record import Record, Row, compare, read
from communicators.errors import InvalidArgumentError
from scripts.bench import __main__ as scripts_bench

ROOT = Path(__file__).parents[2]


def row(us: float, nbytes: int = 1 << 20, **peers: float) -> Row:
    key = {"op": "all_reduce", "dtype": "float32", "ranks": 4, "bytes": nbytes}
    return Row(key, {"communicators": us, **peers})


def record(*rows: Row, commit: str = "abc") -> Record:
    machine = {"cpu": "2 CPUs", "gpus": [], "load_average": 0.1}
    return Record(
        "cpu", ("communicators",), "2026-12-01", commit, "bench cpu", "Linux", machine, rows
    )


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = record(row(2.5, gloo=10.0), dataclasses.replace(row(1.0), notes={"algorithm": "x"}))
    path = tmp_path / "folder" / "r.json"
    written.write(path)
    assert read(path) == written
    stored = json.loads(path.read_text())
    assert {"date", "machine", "driver", "commit", "command"} <= set(stored)


def test_the_published_figures_can_be_compared_with() -> None:
    files = sorted((ROOT / "docs" / "benchmarks").glob("*.json"))
    assert files
    for path in files:
        published = read(path)
        lines, held = compare(published, published, 0.0)
        assert held and len(lines) == sum(len(row.values) for row in published.rows), path


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 0, "rows": []}', '{"schema": 1}'])
def test_what_is_no_record_is_refused_in_a_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(InvalidArgumentError, match=r"r\.json holds no figures of a benchmark"):
        read(path)


def test_ours_decide_whether_a_comparison_held() -> None:
    old = record(row(10.0, gloo=10.0), row(10.0, 8))
    assert compare(old, record(row(10.9, gloo=90.0)), 0.1)[1], "a peer may get worse"
    lines, held = compare(old, record(row(11.1, gloo=9.0), row(5.0, 64)), 0.1)
    assert not held and [one[-1] for one in lines] == ["1.11, worse", "0.90"]
    more = dataclasses.replace(row(10.0), more_is_better=True)
    faster = dataclasses.replace(more, values={"communicators": 20.0})
    assert compare(record(more), record(faster), 0.1)[1]
    assert not compare(record(faster), record(more), 0.1)[1]
    with pytest.raises(InvalidArgumentError, match="nothing to compare"):
        compare(old, record(row(1.0, 4096)), 0.1)


def test_the_compare_command_exits_1_above_its_tolerance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(tmp_path / name) for name in ("old.json", "new.json")]
    record(row(10.0), commit="aaa").write(Path(files[0]))
    record(row(12.0), commit="bbb").write(Path(files[1]))
    assert scripts_bench.main(["compare", *files, "--tolerance", "0.25"]) == 0
    assert scripts_bench.main(["compare", *files]) == 1
    assert "1.20, worse" in capsys.readouterr().out
    assert scripts_bench.main(["compare", files[0], str(tmp_path / "none.json")]) == 1
    assert "holds no figures" in capsys.readouterr().err


def test_tables_have_busbw_ratios_and_gaps() -> None:
    table = report.table(record(row(100.0, gloo=250.0), row(1.0, 8, MPI=3.0)))
    assert table == [
        "| op | dtype | ranks | bytes | communicators, us | gloo, us | MPI, us | busbw, GB/s "
        "| x gloo | x MPI |",
        "|---|---|---|---|---|---|---|---|---|---|",
        "| all_reduce | float32 | 4 | 1 MB | 100 | 250 | - | 15.73 | 2.5 | - |",
        "| all_reduce | float32 | 4 | 8 B | 1 | - | 3 | 0.012 | - | 3.0 |",
    ]
    gathered = Row({"op": "all_gather", "ranks": 4, "bytes": 1000}, {"communicators": 1.0})
    assert report.busbw(gathered, "communicators") == 3.0
    eager = Row({**gathered.key, "timed": "eager"}, gathered.values)
    assert report.busbw(eager, "communicators") is None, "of a graph's time alone"
    rate = Row({"readers": 1}, {"communicators": 6.0, "pyzmq": 2.0}, "messages/s", True)
    assert report.line(rate, ("communicators",)) == (
        "1: communicators 6, pyzmq 2 (3.0 x) messages/s"
    )


def test_sizes_and_their_names() -> None:
    assert [report.parse_size(t) for t in ("7", "64K", "4M", "1G")] == [
        7,
        1 << 16,
        4 << 20,
        1 << 30,
    ]
    assert [report.size_name(n) for n in (8, 1 << 10, 1536, 3 << 20)] == [
        "8 B", "1 KB", "1.5 KB", "3 MB",
    ]  # fmt: skip


def test_one_command_measures_beside_gloo_and_compares(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = [str(tmp_path / name) for name in ("r.json", "r.md")]
    arguments = ["bench", "--device", "cpu", "--sizes", "8", "2K", "--json", files[0]]
    assert cli.main([*arguments, "--markdown", files[1], "--timeout", "120"]) == 0
    printed = capfd.readouterr().out
    assert "[2/2] all_reduce float32 2 2 KB: communicators " in printed
    found = read(Path(files[0]))
    assert found.command == " ".join(["communicators", *arguments, "--markdown", files[1],
                                      "--timeout", "120"])  # fmt: skip
    assert [one.key["bytes"] for one in found.rows] == [8, 2048]
    for one in found.rows:
        assert set(one.values) == {"communicators", "gloo"} and min(one.values.values()) > 0
    assert report.table(found)[-1] in Path(files[1]).read_text()


@pytest.mark.parametrize("case", scripts_bench.CASES)
def test_every_case_has_the_common_options(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        scripts_bench.main([case, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--json", "--markdown", "--plot", "--compare", "--tolerance"):
        assert option in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
@pytest.mark.parametrize("case", ["all_reduce", "ops", "quick_all_reduce"])
def test_gpu_cases_say_that_there_is_none(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert scripts_bench.main([case]) == 1
    assert "torch sees" in capsys.readouterr().err


def test_what_cannot_be_measured_is_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for arguments, sentence in (
        (["--device", "cpu", "--ranks", "1", "--sizes", "8"], "world size 1 is not in 2..64"),
        (["--device", "cuda", "--ranks", "9999"], "got 9999 ranks, and torch sees"),
        (["--device", "cuda", "--ops", "gather"], "on GPUs all_reduce alone is measured"),
        (["--device", "cpu", "--sizes", "64M", "--timeout", "0.2"], "after 0.2 s and were ended"),
        (["--compare", str(tmp_path / "no.json")], "holds no figures of a benchmark"),
    ):
        assert cli.main(["bench", *arguments]) == 1
        error = capfd.readouterr().err
        assert sentence in error and "Traceback" not in error, error
    with pytest.raises(SystemExit):
        cli.main(["bench", "--sizes", "many"])
    assert "a size is a number of bytes, as 64K or 4M; got 'many'" in capfd.readouterr().err
