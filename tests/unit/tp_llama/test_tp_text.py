"""Tokenizers, the text as it comes, and the comparison of --verify."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.tp_llama.errors import CheckpointError
from scripts.tp_llama.text_output import TextOutput
from scripts.tp_llama.tokenizer import ByteTokenizer, PackageTokenizer, TextStream, load_tokenizer
from scripts.tp_llama.train_export import BOS, EOS, tokenizer_json, write_json
from scripts.tp_llama.verify import difference

TEXT = "def f(é):\n\treturn '日本'  # 🙂\n"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_json(tmp_path / "tokenizer.json", tokenizer_json())
    return tmp_path


@pytest.mark.parametrize("with_package", [True, False])
def test_the_shipped_vocabulary(
    directory: Path, with_package: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if with_package:
        pytest.importorskip("tokenizers")
    else:
        monkeypatch.setitem(sys.modules, "tokenizers", None)
    tokenizer = load_tokenizer(directory)
    assert isinstance(tokenizer, PackageTokenizer if with_package else ByteTokenizer)
    assert tokenizer.encode(TEXT) == [BOS, *TEXT.encode()]
    assert tokenizer.decode([BOS, *TEXT.encode(), EOS]) == TEXT
    assert tokenizer.encode("") == [BOS]


def test_without_the_package_a_larger_vocabulary_says_what_to_install(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    description = json.loads((directory / "tokenizer.json").read_text())
    description["model"]["merges"] = ["a b"]
    write_json(directory / "tokenizer.json", description)
    with pytest.raises(CheckpointError, match="pip install tokenizers"):
        load_tokenizer(directory)


def test_broken_files(directory: Path) -> None:
    pytest.importorskip("tokenizers")
    path = directory / "tokenizer.json"
    path.write_text('{"model": 3}')
    with pytest.raises(CheckpointError, match=r"tokenizer.json: not a tokenizer"):
        load_tokenizer(directory)
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: not a JSON file"):
        load_tokenizer(directory)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer.json: .* needs this file"):
        load_tokenizer(directory)


def byte_tokenizer() -> ByteTokenizer:
    return ByteTokenizer(tokenizer_json(), "test")


def test_the_stream_gives_out_whole_characters() -> None:
    stream = TextStream(byte_tokenizer(), [BOS, *b"x"])
    pieces = [stream.push(byte) for byte in TEXT.encode()]
    assert "".join(pieces) == TEXT
    assert all("\ufffd" not in piece for piece in pieces)
    assert pieces[6:8] == ["", "é"]
    assert stream.finish() == ""


def test_the_stream_at_its_end_shows_half_a_character() -> None:
    stream = TextStream(byte_tokenizer(), [BOS])
    assert stream.push("é".encode()[0]) == ""
    assert stream.finish() == "\ufffd"


def test_the_stream_keeps_spaces_that_a_tokenizer_drops() -> None:
    class Words:
        """As SentencePiece does: the space before the first word of a text is not decoded."""

        def encode(self, text: str) -> list[int]:
            raise NotImplementedError

        def decode(self, ids: list[int]) -> str:
            return " ".join(f"w{i}" for i in ids)

    stream = TextStream(Words(), [1, 2])
    assert stream.push(3) + stream.push(4) == " w3 w4"


def test_one_sequence_is_printed_as_it_comes() -> None:
    out = io.StringIO()
    with TextOutput(byte_tokenizer(), [[BOS, *b"ab"]], (EOS,), out) as output:
        assert out.getvalue() == "ab"
        output.put(0, ord("c"))
        assert out.getvalue() == "abc"
        output.put(0, EOS)
    assert out.getvalue() == "abc\n"


def test_lines_of_several_sequences_are_kept_apart() -> None:
    out = io.StringIO()
    with TextOutput(byte_tokenizer(), [[BOS, *b"a"], [BOS, *b"p\nq"]], (EOS,), out) as output:
        for index, byte in ((0, "b"), (1, "r"), (0, "\n"), (1, "s"), (0, "c")):
            output.put(index, ord(byte))
    assert out.getvalue() == "[1] p\n[0] ab\n[0] c\n[1] qrs\n"


def test_the_difference_between_two_runs() -> None:
    assert difference([[1, 2], [3]], [[1, 2], [3]]) is None
    where = difference([[1, 2], [3, 4]], [[1, 2], [3, 5]])
    assert where == "prompt 1: new token 1 is 5 where 4 is expected"
    assert difference([[1, 2]], [[1]]) == "prompt 0: 1 new tokens where 2 are expected"


@pytest.mark.parametrize("described", [[], None, 5, {}, {"model": None}, {"model": {"vocab": 5}}])
def test_a_tokenizer_that_is_something_else(described: Any) -> None:
    with pytest.raises(CheckpointError, match="test: only a vocabulary of single bytes"):
        ByteTokenizer(described, "test")
