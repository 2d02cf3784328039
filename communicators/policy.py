"""Which communicator serves a request: pure functions, the same on all ranks for the same input.

admit -> measured row -> default. Admission is `Capability.refuses`. Among the admitted ones the
measured row of this machine's table decides; where no row speaks, the order of the list does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .base import Capability, Refusal, Request
from .tables import Table


@dataclass(frozen=True)
class Choice:
    """The communicator for a request (None: nobody takes it), why, and why not the others."""

    communicator: str | None
    reason: str
    refused: dict[str, Refusal]


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
    chosen = admitted[0]
    reason = "the first in order of preference that takes it"
    row = table.find(request)
    # A row says nothing of a communicator that was not measured: where that is the preferred one
    # (the user has allowed it since), the order stands.
    measured = row is not None and chosen in {row.communicator, *row.us}
    if row is not None and measured and row.communicator in admitted:
        chosen = row.communicator
        reason = f"measured fastest, {row.us[chosen]:g} us ({table.describe()})"
    rounds = next(capability.rounds for name, capability in live if name == chosen)
    if rounds:
        reason += f"; it rounds, as allowed: {rounds}"
    for name in admitted:
        if name == chosen:
            continue
        if row is not None and name in row.us and chosen in row.us:
            refused[name] = Refusal(f"measured {row.us[name]:g} us against {row.us[chosen]:g}")
        else:
            refused[name] = Refusal(f"takes it, and comes after {chosen}")
    return Choice(chosen, reason, refused)
