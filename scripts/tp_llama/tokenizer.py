"""Text to token ids and back, by the tokenizer.json of the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from .errors import CheckpointError
from .train_export import byte_characters


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class PackageTokenizer:
    """Any tokenizer.json, through the ``tokenizers`` package."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


class ByteTokenizer:
    """A byte-level vocabulary without merges: a token a byte. Needs no package.

    Raises CheckpointError for a tokenizer.json that is something else.
    """

    def __init__(self, description: dict[str, Any], source: str) -> None:
        model = description.get("model") if isinstance(description, dict) else None
        vocab, merges = (
            (model.get("vocab"), model.get("merges")) if isinstance(model, dict) else (None, None)
        )
        characters = byte_characters()
        if merges != [] or not isinstance(vocab, dict) or set(vocab) != set(characters):
            raise CheckpointError(
                f"{source}: only a vocabulary of single bytes can be read without the tokenizers "
                f"package; pip install tokenizers"
            )
        self._id_of = [vocab[character] for character in characters]
        self._byte_of = {token: byte for byte, token in enumerate(self._id_of)}
        self._prefix = _prefix_ids(description.get("post_processor"))

    def encode(self, text: str) -> list[int]:
        return self._prefix + [self._id_of[byte] for byte in text.encode("utf-8")]

    def decode(self, ids: Sequence[int]) -> str:
        known = bytes(self._byte_of[token] for token in ids if token in self._byte_of)
        return known.decode("utf-8", errors="replace")


def _prefix_ids(post_processor: dict[str, Any] | None) -> list[int]:
    """The special tokens that a template puts before the text."""
    ids: list[int] = []
    for piece in (post_processor or {}).get("single", []):
        if "SpecialToken" not in piece:
            break
        ids += (post_processor or {})["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    return ids


def load_tokenizer(directory: Path) -> Tokenizer:
    """Raises CheckpointError where the file is missing, broken, or needs the package."""
    path = directory / "tokenizer.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path}: a checkpoint directory needs this file; {error.strerror}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a JSON file; {error}") from error
    try:
        import tokenizers
    except ImportError:
        return ByteTokenizer(description, str(path))
    try:
        return PackageTokenizer(tokenizers.Tokenizer.from_file(str(path)))
    except Exception as error:
        raise CheckpointError(f"{path}: not a tokenizer; {error}") from error


class TextStream:
    """Turns a growing list of token ids into text, piece by piece.

    A token may end inside a character, and a tokenizer may drop the space at the start of what it
    decodes. So a few ids before the new ones are decoded with them, and nothing is given out while
    the text ends in the replacement character.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._context = max(0, len(self._ids) - 8)
        self._given = len(self._ids)

    def push(self, token: int) -> str:
        """The text that this token completes, possibly none."""
        self._ids.append(token)
        return self._new_text(final=False)

    def finish(self) -> str:
        """What is left, an incomplete character as the replacement character."""
        return self._new_text(final=True)

    def _new_text(self, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._context : self._given])
        after = self._tokenizer.decode(self._ids[self._context :])
        if after.endswith("\ufffd") and not final:
            return ""
        self._context, self._given = max(0, self._given - 8), len(self._ids)
        return after[len(before) :]
