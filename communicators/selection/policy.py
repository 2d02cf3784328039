"""Which communicator serves a request: pure functions, the same on all ranks for the same input.

admit -> measured times -> default. Admission is `Capability.refuses`. Among the admitted ones the
measured times of this machine's table decide (tables.py says which speak for a request); where none
do, the order of the list does. Times are noisy, and communicators differ in more than time (how a
fault ends, whose bits are equal), so the order yields to a gain of more than 3% alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..base import Capability, Refusal, Request
from .tables import Table

#: Of several communicators within this factor of the fastest the first in order is taken.
MARGIN = 1.03


@dataclass(frozen=True)
class Choice:
    """The communicator for a request (None: nobody takes it), why, and why not the others."""

    communicator: str | None
    reason: str
    refused: dict[str, Refusal]
    quote: str = ""  # its measured time and where, "2.3 us at 64 KB"


def preferred(us: Mapping[str, float], order: Iterable[str]) -> str:
    """The first of `order` whose time is within MARGIN of the least; others are passed over."""
    measured = [name for name in order if name in us]
    most = min(us[name] for name in measured) * MARGIN
    return next(name for name in measured if us[name] <= most)


def choose(request: Request, live: Sequence[tuple[str, Capability]], table: Table) -> Choice:
    """Picks from the live communicators, given in order of preference.

    Returns a Choice whose `refused` holds every other live communicator with the reason.
    """
    refused: dict[str, Refusal] = {}
    admitted: list[str] = []
    for name, capability in live:
        refusal = capability.refuses(request)
        if refusal is None:
            admitted.append(name)
        else:
            refused[name] = refusal
    if not admitted:
        return Choice(None, "no communicator takes it", refused)
    chosen, quote = admitted[0], ""
    reason = "the first in order of preference that takes it"
    us: Mapping[str, float] = {}
    times = table.times(request)
    # Times say nothing of a communicator that was not measured: where that is the preferred one
    # (the user has allowed it since), the order stands.
    if times is not None and chosen in times.us:
        us = times.us
        chosen = preferred(us, admitted)
        quote = f"{us[chosen]:.6g} us {times.where}"
        least = min(us[name] for name in admitted if name in us)
        how = "measured fastest"
        if us[chosen] > least:
            how = "measured within 3% of the fastest and before it in order"
        reason = f"{how}, {quote} ({table.describe()})"
    rounds = next(capability.rounds for name, capability in live if name == chosen)
    if rounds:
        reason += f"; it rounds, as allowed: {rounds}"
    for name in admitted:
        if name == chosen:
            continue
        if times is not None and name in us:
            refused[name] = Refusal(
                f"measured {us[name]:.6g} us against {us[chosen]:.6g} {times.where}"
            )
        else:
            refused[name] = Refusal(f"takes it, and comes after {chosen}")
    return Choice(chosen, reason, refused, quote)
