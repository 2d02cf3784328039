"""Print the text of one or more sequences as it comes."""

from __future__ import annotations

from types import TracebackType
from typing import TextIO

from .tokenizer import TextStream, Tokenizer


class TextOutput:
    """One sequence is printed piece by piece; of several, each line when it is complete.

    With several, a line starts with the number of its prompt in brackets. Use as a context
    manager: what is left is printed at the end.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompts: list[list[int]],
        eos_token_ids: tuple[int, ...],
        out: TextIO,
    ) -> None:
        self._streams = [TextStream(tokenizer, prompt) for prompt in prompts]
        self._prompts = [tokenizer.decode(prompt) for prompt in prompts]
        self._lines = [""] * len(prompts)
        self._silent = set(eos_token_ids)
        self._out = out

    def __enter__(self) -> TextOutput:
        for index, prompt in enumerate(self._prompts):
            self._print(index, prompt)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for index, stream in enumerate(self._streams):
            self._print(index, stream.finish())
            if len(self._streams) == 1:
                self._write("\n")
            elif self._lines[index]:
                self._write(f"[{index}] {self._lines[index]}\n")

    def put(self, index: int, token: int) -> None:
        """Token ``token`` follows in sequence ``index``."""
        if token not in self._silent:
            self._print(index, self._streams[index].push(token))

    def _print(self, index: int, text: str) -> None:
        if len(self._streams) == 1:
            self._write(text)
            return
        *complete, self._lines[index] = (self._lines[index] + text).split("\n")
        self._write("".join(f"[{index}] {line}\n" for line in complete))

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
