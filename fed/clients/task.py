"""The task of a client in a round: run by a driver, its result kept as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from fed.clients.update import Update
from fed.state import State
from llava.atomic import write_text
from llava.errors import InputError

# Takes a client's logs: its step, counted over all its rounds, and values by name.
Log: TypeAlias = Callable[[int, dict[str, float]], None]


class ClientError(InputError):
    """A client's work came to nothing. The message names the client, the round and the reason."""


@dataclass(frozen=True, eq=False)
class ClientTask:
    """A client, what it is sent, and where its work lies while the round is not over.

    `extras` is what it is sent beside the state, `kept` what it has kept of its last task, where
    the server has that; `last_round` is that of the last update that counted, 0 if there is none.
    """

    client: Any
    state: State
    round: int
    folder: Path
    extras: State = field(default_factory=dict)
    kept: State = field(default_factory=dict)
    last_round: int = 0

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


Result: TypeAlias = Update | ClientError


def failures(tasks: Sequence[ClientTask]) -> dict[str, str]:
    """The clients that have left this round in an earlier start, with the reasons."""
    return {t.name: t.failure_file.read_text() for t in tasks if t.failure_file.exists()}


def keep_failure(task: ClientTask, reason: str) -> None:
    write_text(task.failure_file, reason)


def may_fail(tasks: Sequence[ClientTask], at_least: int) -> int:
    """The number of clients with samples that may leave the round; at_least 0: none."""
    working = sum(task.client.samples(task.round) > 0 for task in tasks)
    return working - min(at_least or working, working)
