"""A round's turns: the work of one client each, run by a driver and kept as soon as it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from fed.server.round_state import Update, load_update
from fed.state import State
from llava.atomic import write_text
from llava.errors import InputError

# Takes a client's logs: its step, counted over all its rounds, and values by name.
Log: TypeAlias = Callable[[int, dict[str, float]], None]


class ClientFailed(InputError):
    """A client's work came to nothing. The message names the client, the round and the reason."""


@dataclass(frozen=True, eq=False)
class Turn:
    """A client, what it is sent, and where its work lies while the round is not over.

    `extras` is what it is sent beside the state, `kept` what it has kept of its last turn.
    """

    client: Any
    state: State
    round: int
    folder: Path
    extras: State = field(default_factory=dict)
    kept: State = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.client.name

    @property
    def work_dir(self) -> Path:
        return self.folder / self.name

    @property
    def update_file(self) -> Path:
        return self.folder / f"{self.name}.safetensors"

    @property
    def failure_file(self) -> Path:
        return self.folder / f"{self.name}.failed"


class FitMany(Protocol):
    """The driver contract: run turns, in any order, and give each result when it is there.

    A `ClientFailed` may be given for an update; any other exception ends the run. `go_on()` is
    asked before a turn is begun: when it says no, those at work are finished and no more begun.
    """

    def __call__(
        self, turns: Sequence[Turn], go_on: Callable[[], bool]
    ) -> Iterator[tuple[Turn, Result]]: ...


Result: TypeAlias = Update | ClientFailed


def finished(turns: Sequence[Turn]) -> dict[str, Update]:
    """The updates that an earlier start of this round has kept."""
    return {t.name: load_update(t.update_file) for t in turns if t.update_file.exists()}


def failures(turns: Sequence[Turn]) -> dict[str, str]:
    """The clients that have left this round in an earlier start, with the reasons."""
    return {t.name: t.failure_file.read_text() for t in turns if t.failure_file.exists()}


def keep_failure(turn: Turn, reason: str) -> None:
    write_text(turn.failure_file, reason)


def may_fail(turns: Sequence[Turn], at_least: int) -> int:
    """How many of the clients that have samples may leave the round; at_least 0: none."""
    working = sum(turn.client.samples(turn.round) > 0 for turn in turns)
    return working - min(at_least or working, working)
