"""Tables: what is read, and the sentence for what is none."""

import os
import re

import pytest
import torch

from communicators import Settings
from communicators.errors import SettingsError
from communicators.selection.opening import machine_table
from communicators.selection.tables import EMPTY, load, parse
from tests.threads import run_ranks
from tests.unit.table_maker import table_text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rows__0__op": "sum"}, "row 0 has op 'sum'"),
        ({"rows__1__up_to_bytes": "big"}, "row 1 needs 'up_to_bytes'"),
        ({"machine__world_size": None}, "the machine"),
        ({"measured__commit": 7}, "needs 'commit'"),
        ({"rows": {}}, "needs 'rows'"),
        ({"rows": [7]}, "row 0 needs 'us'"),
        ({"merged": "no"}, "needs 'merged' of type bool"),
        ({"machine__link": ["NV1"]}, "needs 'link' of type str"),
        ({"machine__world_size": True}, "needs 'world_size' of type int"),
        ({"rows__0__dtype": "bfloat17"}, "row 0 has dtype 'bfloat17'"),
        ({"rows__0__dtype": "nn"}, "row 0 has dtype 'nn'"),
        ({"rows__0__up_to_bytes": 10**400}, "row 0 has op"),
        ({"rows__0__up_to_bytes": 0}, "up_to_bytes 0"),
        ({"rows__0__communicator": "fast"}, "row 0 names 'fast'"),
        ({"rows__0__us": {}}, "row 0 names 'all'"),
        ({"rows__0__us": {"all": "2"}}, "a time of 2 for 'all'"),
        ({"rows__0__us": {"all": None}}, "a time of None for 'all'"),
        ({"rows__0__us": {"all": float("nan")}}, "a time of nan for 'all'"),
        ({"rows__0__us": {"all": float("inf")}}, "a time of inf for 'all'"),
        ({"rows__0__us": {"all": -1}}, "a time of -1 for 'all'"),
        ({"rows__0__us": {"all": 0}}, "a time of 0 for 'all'"),
        ({"rows__0__us": {"all": True}}, "a time of True for 'all'"),
        ({"rows__0__us": [2.0]}, "row 0 needs 'us' of type dict"),
    ],
)
def test_a_bad_table_is_named_with_its_row(changes, reason):
    with pytest.raises(SettingsError) as caught:
        parse(table_text(**changes), "toy.json")
    assert "toy.json" in str(caught.value)
    assert reason.replace("the machine", "machine") in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "1" * 5000, "\0", "nan"])
def test_what_is_no_table_is_named(text):
    with pytest.raises(SettingsError, match=r"^toy\.json"):
        parse(text, "toy.json")
    with pytest.raises(SettingsError, match=r"toy\.json: the table needs 'machine'"):
        parse("[]", "toy.json")


def _other_files(directory):
    """name -> makes something of that name that is no table."""
    return {
        "bytes": lambda path: path.write_bytes(b"\xff\xfe\0"),
        "text": lambda path: path.write_text("a note"),
        "other json": lambda path: path.write_text('{"name": "package"}'),
        "folder": lambda path: path.mkdir(),
        "pipe": os.mkfifo,
        "dangling link": lambda path: path.symlink_to(directory / "nowhere"),
        "link to itself": lambda path: path.symlink_to(path),
        "device": lambda path: path.symlink_to("/dev/zero"),
        "large": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
    }


@pytest.mark.parametrize("kind", _other_files(None))
def test_a_file_of_any_content_is_an_error_of_all_ranks(tmp_path, kind):
    good, bad = tmp_path / "good", tmp_path / "bad"
    for directory in (good, bad):
        directory.mkdir()
        (directory / "a.json").write_text(table_text())
    path = bad / "b.json"
    _other_files(bad)[kind](path)

    def body(group):
        group.settings = Settings(table_dir=str(bad if group.rank == 1 else good))
        return machine_table(group, torch.device("cpu"))

    for error in run_ranks(2, body):
        assert isinstance(error, SettingsError)
        assert str(path) in str(error) and "the tables of rank 1" in str(error)


def test_a_directory_that_is_none_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    for directory in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(SettingsError, match=re.escape(f"{directory} is no directory")):
            load("Toy", "NV1", 2, [directory])


def test_tables_are_found_by_machine_shape(tmp_path):
    (tmp_path / "toy.json").write_text(table_text())
    assert load("Toy", "NV1", 2, [tmp_path]).machine["device"] == "Toy"
    assert load("Toy", "NV1", 4, [tmp_path]) is EMPTY
    assert load("Toy", "", 2, [tmp_path]) is EMPTY
    assert len(load("Toy", "NV1", 2, [tmp_path]).digest) == 16


def test_shipped_tables_are_valid():
    from pathlib import Path

    import communicators

    for path in (Path(communicators.__file__).parent / "tables").glob("*.json"):
        assert parse(path.read_text(), str(path)).rows
