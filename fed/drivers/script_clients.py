"""The clients of the script driver: each a command, its records and their slices."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from typing import Any

from fed.clients.clients_yaml import ClientSpec, named
from fed.clients.slices import cut
from fed.drivers.client_process import ProcessSpec, check_command, split_command
from fed.drivers.driver import Run
from fed.drivers.flags import CommandFlags
from llava.errors import InputError
from llava.train.data import load_records
from llava.train.preprocess import says_nothing

logger = logging.getLogger(__name__)


@dataclass
class ScriptClient:
    """A client that is a process: its command with its own flags, its records, its slices."""

    name: str
    command: list[str]
    records: list[dict]
    slices: list[list[int]]
    seed: int
    image_folder: str | None = None
    process: ProcessSpec = field(default_factory=ProcessSpec)

    def samples(self, round: int) -> int:
        """The number of samples that round `round` (from 1) trains on."""
        return len(self.slices[round - 1])

    def shares_gpu(self, other: ScriptClient) -> bool:
        return bool({*(self.process.gpus or ())} & {*(other.process.gpus or ())})


def make_clients(run: Run) -> list[ScriptClient]:
    """The clients of a run; their commands and records are checked."""
    fed, training = run.arguments.fed, run.arguments.training
    common, command = None, run.flags(CommandFlags).fed_client_command
    if command is not None:
        common = split_command(command, "--fed_client_command")
    commands, records = [], []
    for spec in run.specs:
        with named(spec):
            commands.append(_own_command(spec, common))
            records.append(_teaching(spec))
    cuts = cut(
        run.specs,
        [len(own) for own in records],
        run.rounds,
        one_pass=fed.fed_one_pass,
        seed=training.seed,
    )
    return [
        ScriptClient(
            spec.name,
            command,
            own,
            slices,
            seed=training.seed,
            image_folder=spec.image_folder or run.arguments.data.image_folder,
            process=spec.driver,
        )
        for spec, command, own, slices in zip(run.specs, commands, records, cuts, strict=True)
    ]


def _teaching(spec: ClientSpec) -> list[dict[str, Any]]:
    """A client's records, without those that teach nothing: they must not count in the average.

    What --model_max_length cuts off, only the client's process can tell.
    """
    records = load_records(spec.data_path)
    kept = [record for record in records if not says_nothing(record)]
    if not kept:
        raise InputError(
            f"{spec.data_path}: there is nothing to learn in it: all of its {len(records)} records "
            "have an empty answer"
        )
    if left_out := len(records) - len(kept):
        logger.info(
            "client %s: %d samples, %d left out: their answers are empty",
            spec.name,
            len(kept),
            left_out,
        )
    return kept


def _own_command(spec: ClientSpec, common: tuple[str, ...] | None) -> list[str]:
    command = spec.driver.command or common
    if command is None:
        raise InputError("it has no `command`, and there is no --fed_client_command")
    path = spec.driver.environment(os.environ).get("PATH", os.defpath)
    check_command(command, spec.driver.cwd, path, "its command")
    return [*command, *(word for k, v in spec.overrides.items() for word in (f"--{k}", v))]
