"""No aggregation: every client keeps what it has. The reference that federation must beat."""

from __future__ import annotations

from fed.methods.interface.method import Outcome
from fed.methods.interface.registry import method
from fed.state import State


@method("local", personal=True)
def local(states: list[State], *, weights: list[float], base: State) -> Outcome:
    """One state per client, its own."""
    return Outcome(states)
