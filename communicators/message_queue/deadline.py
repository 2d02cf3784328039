"""How long something may still wait."""

from __future__ import annotations

import math
import time

from ..errors import InvalidArgumentError
from ..settings import Settings

#: Whoever waits looks this often, in seconds, whether the other side still runs, and comes back to
#: Python for signals that another thread of the process took. So long may a death go unnoticed;
#: more often would make waiting cost something. (In native code: kLivenessNs, kSignalsNs.)
LOOK_S = 0.5


class Deadline:
    """A point in time until which something may wait; `seconds` None: the Settings' deadline.

    `waited`: so many of the seconds have passed.
    """

    def __init__(self, seconds: float | None, settings: Settings, waited: float = 0.0) -> None:
        self.seconds = settings.timeout_s if seconds is None else seconds
        if math.isnan(self.seconds) or self.seconds < 0:
            raise InvalidArgumentError(
                f"timeout={seconds}: seconds, 0 or more, are expected (inf waits as long as the "
                "other side lives)"
            )
        self._at = time.monotonic() + self.seconds - waited

    def left(self) -> float:
        """Seconds, never negative."""
        return max(0.0, self._at - time.monotonic())

    def slice_ns(self, longest: float) -> int:
        """How long one call into native code may wait, in nanoseconds."""
        return int(min(self.left(), longest) * 1e9)
