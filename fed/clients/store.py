"""The store of clients' private parameters between their tasks, and the checkpoints of a run.

This store keeps nothing: a run ends with one checkpoint, or with one a client where the method
gives each client a state. A method whose clients have private parameters brings a store of its own
(`Method.store`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from torch import Tensor, nn
from transformers import PreTrainedConfig

from fed.clients.task import ClientTask, Log
from fed.state import State
from llava.model.checkpoint import write_config
from llava.model.trainable_part import TrainablePart

logger = logging.getLogger(__name__)

# A client -> what it is sent after the last round: its state, and the extras beside it.
Sent: TypeAlias = Callable[[str], tuple[State, State]]


class FinishedRun(Protocol):
    """The server's state after a round, as much of it as checkpoints and newcomers need."""

    @property
    def round(self) -> int: ...
    @property
    def shared(self) -> State: ...
    @property
    def personal(self) -> Mapping[str, State]: ...
    @property
    def memory(self) -> State: ...
    @property
    def settings(self) -> Mapping[str, Any]: ...


class ClientStore:
    """The store of methods whose clients keep nothing.

    Args:
        part: what trains and is sent. A store may narrow the one that it is given.
        config: of the model, for `config.json`.
        main: whether this process writes.
    """

    def __init__(self, part: TrainablePart, config: PreTrainedConfig, main: bool = True):
        self.part, self.config, self.main = part, config, main

    def enter(self, task: ClientTask) -> dict[nn.Parameter, Tensor] | None:
        """The task begins: make the model the client's. Every rank calls it.

        Returns:
            The client's own parameters with the values that they begin with: where parameters have
            16 bits, DeepSpeed's float32 copies begin with these and not with their rounding.
        """
        return None

    def leave(self, task: ClientTask) -> None:
        """The task is done: keep what is the client's, while the trainer's optimizer is there.
        Every rank calls it."""

    def given(self, task: ClientTask) -> tuple[State, dict[str, Any]]:
        """What a process of the client's own is given for the task beside its state: tensors by the
        state's names, and flags."""
        return {}, {}

    def take_back(self, task: ClientTask, tensors: State) -> None:
        """Keep what the process has made of the tensors that it was given beside its state."""

    def visit(self, client: str, extras: State, round: int) -> None:
        """Make the model the client's as `round` has left it, to measure it."""

    def work_dir(self, task: ClientTask) -> Path:
        """The folder of the trainer's checkpoints of a task."""
        return task.work_dir

    def log_of(self, client: str, log: Log) -> Log:
        """The taker of a client's logs, where the run's would be `log`."""
        return log

    def changed_arguments(self, round: int) -> dict[str, Any]:
        """Training arguments that are others in a round, by name."""
        return {}

    def export_shared(self, final: FinishedRun, sent: Sent, output_dir: Path) -> None:
        """`export` where the clients' private parameters are not on this machine."""
        self.export(final, sent, output_dir)

    def export(self, final: FinishedRun, sent: Sent, output_dir: Path) -> None:
        """Write the checkpoints that the run leaves. Every rank calls it."""
        if not self.main:
            return
        places = {output_dir: final.shared}
        if final.personal:
            places = {output_dir / "clients" / name: s for name, s in final.personal.items()}
        for folder, trained in places.items():
            self.part.write(trained, folder)
            write_config(self.config, folder, full=False)
            logger.info("wrote %s", folder / self.part.files[0])
