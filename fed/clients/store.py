"""The store of clients' private parameters between their tasks, and the checkpoints of a run.

This store keeps nothing: a run ends with one checkpoint, or with one a client where the method
gives each client a state. A method whose clients have private parameters brings a store of its own
(`Method.store`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from transformers import PreTrainedConfig

from fed.clients.task import ClientTask, Log
from fed.state import State
from llava.model.checkpoint import write_config
from llava.model.trainable_part import TrainablePart

if TYPE_CHECKING:
    from fed.server.round_state import RoundState

# (the server's state, a client) -> what the client is sent: its state, and what goes beside it.
Sent: TypeAlias = "Callable[[RoundState, str], tuple[State, State]]"


class ClientStore:
    """The store of methods whose clients keep nothing.

    Args:
        part: what trains and is sent. A store may narrow the one that it is given.
        config: of the model, for `config.json`.
        main: whether this process writes.
    """

    def __init__(self, part: TrainablePart, config: PreTrainedConfig, main: bool = True):
        self.part, self.config, self.main = part, config, main

    def enter(self, task: ClientTask) -> None:
        """The task begins: make the model the client's. Every rank calls it."""

    def leave(self, task: ClientTask) -> None:
        """The task is done: keep what is the client's. Every rank calls it."""

    def visit(self, client: str, beside: State, round: int) -> None:
        """Make the model the client's as `round` has left it, to measure it."""

    def work_dir(self, task: ClientTask) -> Path:
        """Where the trainer's checkpoints of a task lie."""
        return task.work_dir

    def log_of(self, client: str, log: Log) -> Log:
        """The taker of a client's logs, where the run's would be `log`."""
        return log

    def changed_arguments(self, round: int) -> dict[str, Any]:
        """Training arguments that are others in a round, by name."""
        return {}

    def export_shared(self, final: RoundState, sent: Sent, output_dir: Path) -> None:
        """`export` where the clients' private parameters are not on this machine."""
        self.export(final, sent, output_dir)

    def export(self, final: RoundState, sent: Sent, output_dir: Path) -> None:
        """Write the checkpoints that the run leaves. Every rank calls it."""
        if not self.main:
            return
        places = {output_dir: final.shared}
        if final.personal:
            places = {output_dir / "clients" / name: s for name, s in final.personal.items()}
        for folder, trained in places.items():
            self.part.write(trained, folder)
            write_config(self.config, folder, full=False)
            print(f"wrote {folder / self.part.files[0]}", flush=True)
