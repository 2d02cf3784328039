"""Fields of a JSON object by type: each is what it must be, or one sentence names file and field.

JSON from the wild holds "32", 32.0, true and null where 32 is meant. What transformers refuses is
refused here, and so is what it takes and no model can use (a factor of 0, a negative size).
"""

from __future__ import annotations

import math
from typing import Any

from .errors import CheckpointError

MOST = 2**31 - 1
_REFUSED = object()
_SHOWN = 60  # characters of a value that an error repeats


class Fields:
    """One object of a file.

    Attributes:
        source: the file, for errors.
        inside: "", or the name of the object within the file and a blank.
    """

    def __init__(self, fields: dict[str, Any], source: str, inside: str = "") -> None:
        self.fields, self.source, self.inside = fields, source, inside

    def wrong(self, name: str, rule: str) -> CheckpointError:
        shown = repr(self.fields.get(name))
        shown = shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "..."
        return CheckpointError(f"{self.source}: {self.inside}{name} {rule}; got {shown}")

    def choice(self, name: str, default: str, accepted: tuple[str, ...]) -> str:
        value = self.fields.get(name, default)
        if not isinstance(value, str) or value not in accepted:
            shown = repr(value)[:_SHOWN]
            raise CheckpointError(
                f"{self.source}: {self.inside}{name} is {shown}; accepted: {', '.join(accepted)}"
            )
        return value

    def only(self, name: str, accepted: float) -> None:
        value = self.fields[name]
        if isinstance(value, bool) or value != accepted:
            shown = repr(value)[:_SHOWN]
            raise CheckpointError(
                f"{self.source}: {self.inside}{name} is {shown}; accepted: {accepted}"
            )

    def flag(self, name: str) -> bool:
        """true or false; false where it is not there."""
        value = self.fields.get(name, False)
        if not isinstance(value, bool):
            raise self.wrong(name, "must be true or false")
        return value

    def count(
        self,
        name: str,
        default: int | None = None,
        *,
        null: Any = _REFUSED,
        least: int = 1,
        most: int = MOST,
    ) -> Any:
        """An integer of ``least`` to ``most``; ``default`` where it is not there, if one is given.

        ``null``: what a null stands for, where it may be one.
        """
        if name not in self.fields and default is not None:
            return default
        value = self.fields.get(name)
        nullable = null is not _REFUSED
        if value is None and nullable:
            return null
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
            rule = f"must be {kind}{' or null' if nullable else ''}"
            if isinstance(value, int) and value > most:
                rule += f" up to {most}"
            raise self.wrong(name, rule)
        return value

    def number(self, name: str, default: float | None, *, least: float | None = None) -> float:
        """A finite number above 0, or of at least ``least``."""
        value: Any = self.fields.get(name, default)
        ok = isinstance(value, int | float) and not isinstance(value, bool)
        ok = ok and abs(value) < 1e300 and math.isfinite(value)  # larger integers are no floats
        if not ok or (value <= 0 if least is None else value < least):
            bound = "above 0" if least is None else f"of at least {least:g}"
            raise self.wrong(name, f"must be a finite number {bound}")
        return float(value)

    def token_id(self, name: str) -> int | None:
        value = self.fields.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise self.wrong(name, "must be an integer or null")
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One id, a list of them, or null."""
        value = self.fields.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(one, bool) or not isinstance(one, int) for one in ids):
            raise self.wrong(name, "must be an integer, a list of integers or null")
        return tuple(ids)

    def rope(self) -> Fields:
        """``rope_scaling`` where it says anything, else ``rope_parameters``, as transformers does.

        The two are not merged: beside a rope_scaling, rope_parameters is not read at all.
        """
        for name in ("rope_scaling", "rope_parameters"):
            value = self.fields.get(name)
            if value is not None and not isinstance(value, dict):
                raise self.wrong(name, "must be an object or null")
        name = "rope_scaling" if self.fields.get("rope_scaling") else "rope_parameters"
        rope: dict[str, Any] = self.fields.get(name) or {}
        layered = [key for key, value in rope.items() if isinstance(value, dict)]
        if layered:
            raise CheckpointError(
                f"{self.source}: {name} differs by layer type ({', '.join(layered)[:_SHOWN]}); one "
                f"object for all layers is accepted"
            )
        return Fields(rope, self.source, f"{name}'s ")
