"""No aggregation: every client keeps what it has. The reference that federation must beat."""

from __future__ import annotations

from fed.methods.interface.registry import Outcome, method
from fed.state import State


@method("local", personal=True)
def local(states: list[State], *, weights: list[float], base: State, memory: dict) -> Outcome:
    """One state per client, its own."""
    return Outcome(list(states))
