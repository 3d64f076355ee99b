"""Pilot's part of a federated run: its flag, what it refuses, and its clients' store."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fed.methods.pilot.refusals import refuse_own_tasks
from llava.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from fed.arguments import Arguments
    from fed.clients.clients_yaml import ClientSpec
    from fed.clients.store import FinishedRun
    from fed.drivers.driver import Run
    from fed.methods.pilot.private_parameters import PrivateParameters
    from llava.model.trainable_part import TrainablePart

WHO = "--fed_method pilot"


@dataclass
class PilotFlags:
    pilot_stage1_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Pilot: that of the first exchange; --learning_rate when not given."},
    )


def exchanges(rounds: int) -> int:
    """The first round has two stages, each with an exchange."""
    return rounds + 1


def prepare(specs: Sequence[ClientSpec], arguments: Arguments) -> Arguments:
    """The arguments with the tasks of clients.yaml; `InputError` where they do not go together."""
    model: Any = arguments.model  # with the connector's flags
    fed = arguments.fed
    if fed.fed_pool:
        raise InputError(
            f"{WHO} has no place with --fed_pool: all data in one place has no tasks to keep apart"
        )
    refuse_own_tasks(model, WHO, f"tasks are in {fed.fed_clients}")
    for spec in specs:
        if spec.task is None:
            raise InputError(f"{WHO}: client {spec.name} of {fed.fed_clients} has no `task`")
    tasks = list(dict.fromkeys(_task_of(specs).values()))
    return arguments._replace(model=dataclasses.replace(model, pilot_tasks=tasks))


def _task_of(specs: Sequence[ClientSpec]) -> dict[str, str]:
    """The task of each client."""
    return {spec.name: spec.task for spec in specs if spec.task is not None}


def store(model: nn.Module, part: TrainablePart, run: Run) -> PrivateParameters:
    """The clients' private parameters, in OUTPUT/clients."""
    from fed.methods.pilot.private_parameters import PrivateParameters

    model_flags: Any = run.arguments.model
    return PrivateParameters(
        model,
        run.output_dir / "clients",
        _task_of(run.specs),
        model_flags.pilot_tasks,
        part=part,
        main=run.main,
        first_rate=run.flags(PilotFlags).pilot_stage1_learning_rate,
    )


def personalise(argv: Sequence[str], read: Callable[[Path], FinishedRun]) -> None:
    """A newcomer's private parameters, fitted after a run whose state `read` gives."""
    from fed.methods.pilot.personalise import personalise as fit

    fit(argv, read)
