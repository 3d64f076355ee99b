"""The private parameters of Pilot's clients, on the client's side of the run.

Of its connector a client shares the adapter of its task. The rest (`PilotConnector.private`: client
adapter, cross-task adapters, router) lies in OUTPUT/clients/NAME/, is loaded when the client's task
begins and written when it ends, and is in nothing that is sent, nor in OUTPUT/fed/, where the
server has its files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fed.clients.store import ClientStore, FinishedRun, Sent
from fed.clients.task import ClientTask, Log
from fed.clients.tensor_file import load_with_facts, save_with_facts
from fed.methods.pilot.export import export, write_tasks
from fed.state import State
from llava.errors import InputError
from llava.model.checkpoint import copies, copy_in
from llava.model.checkpoint_names import PROJECTOR_PREFIX
from llava.model.multimodal_projector.connector import TRAINED
from llava.model.trainable_part import TrainablePart
from llava.train.optimizer_copy import float32_copies


class PrivateParameters(ClientStore):
    """The model's connector, which belongs to one client after the other.

    Args:
        model: a LLaVA whose connector is `pilot`, or peft's wrapper around it, as every client
            begins with it.
        root: OUTPUT/clients.
        task_of: the task of each client.
        tasks: all tasks, in the order that the run has them.
        part: what trains and is shared.
        main: whether this process writes.
        first_rate: the learning rate of the first round, where it has one of its own.
    """

    def __init__(
        self,
        model: Any,
        root: Path,
        task_of: Mapping[str, str],
        tasks: Sequence[str],
        part: TrainablePart,
        main: bool = True,
        first_rate: float | None = None,
    ):
        super().__init__(part, model.config, main)
        self.model, self.first_rate = model, first_rate
        self.connector = model.get_model().mm_projector
        self.root, self.task_of, self.tasks = root, task_of, tasks
        parameters = dict(self.connector.named_parameters())
        self.private = {name: parameters[name] for name in self.connector.private()}
        self.others = {n: p for n, p in parameters.items() if n.startswith("pilot.others.")}
        self.initial = copies(parameters)

    def order(self, client: str) -> list[str]:
        """All tasks as the client's connector has them: its own first."""
        own = self.task_of[client]
        return [own, *(task for task in self.tasks if task != own)]

    def folder(self, client: str) -> Path:
        return self.root / client

    def work_dir(self, task: ClientTask) -> Path:
        """The folder of the trainer's checkpoints of a task, which hold private parameters."""
        return self.folder(task.name) / f"turn-{task.round:04d}"

    def enter(self, task: ClientTask) -> dict[nn.Parameter, Tensor]:
        self._check_kept(task)
        kept = self._put(task.name, task.extras, task.round, kept_before=task.last_round + 1)
        return {self.private[name]: tensor for name, tensor in kept.items()}

    def _check_kept(self, task: ClientTask) -> None:
        """Refuse to go on without what the client's last task has left."""
        if task.last_round and not self._file(task.name, task.last_round).exists():
            raise InputError(
                f"{self._file(task.name, task.last_round)}: no such file; it had the private "
                f"parameters of client {task.name} after round {task.last_round}"
            )

    def visit(self, client: str, extras: State, round: int) -> None:
        self._put(client, extras, round, kept_before=round + 1)

    def changed_arguments(self, round: int) -> dict[str, Any]:
        if round == 1 and self.first_rate is not None:
            return {"learning_rate": self.first_rate}
        return {}

    def _put(self, client: str, extras: State, round: int, kept_before: int) -> State:
        """Make the connector the client's; returns its private parameters' values.

        Args:
            extras: the adapters of the other tasks, `TASK/model.mm_projector.NAME`. A task that
                nobody has trained yet has the adapter that everybody began with.
            round: whose stage it has; the first round is stage 1.
            kept_before: what the last task before this round has left is taken.
        """
        self.connector.settings.stage = _stage(round)
        self.connector.train_groups(*TRAINED)
        kept = self._kept(client, kept_before)
        copy_in(kept, self.private, f"the private parameters of client {client}")
        others = self._others(client, extras)
        copy_in(others, self.others, f"the other tasks' adapters sent to client {client}")
        return kept

    def _kept(self, client: str, before: int) -> State:
        """The tensors left by the last task before round `before`, else the initial ones."""
        files = [f for f in self._files(client) if int(f.stem) < before]
        if files:
            return load_with_facts(files[-1])[0]
        return {name: self.initial[name] for name in self.private}

    def _others(self, client: str, extras: State) -> State:
        found = {}
        for name in self.others:
            _, _, index, rest = name.split(".", 3)
            task = self.order(client)[1 + int(index)]
            sent = extras.get(f"{task}/{PROJECTOR_PREFIX}{rest}")
            found[name] = self.initial[rest] if sent is None else sent
        return found

    def given(self, task: ClientTask) -> tuple[State, dict[str, Any]]:
        self._check_kept(task)
        beside = self._kept(task.name, task.last_round + 1) | self._others(task.name, task.extras)
        flags = {"pilot_stage": _stage(task.round), "pilot_tasks": self.order(task.name)}
        return (
            {PROJECTOR_PREFIX + name: tensor for name, tensor in beside.items()},
            flags | self.changed_arguments(task.round),
        )

    def take_back(self, task: ClientTask, tensors: State) -> None:
        self._keep(task, {name: tensors[PROJECTOR_PREFIX + name] for name in self.private})

    def leave(self, task: ClientTask) -> None:
        tensors = float32_copies(self.private)
        if self.main:
            self._keep(task, tensors)

    def _keep(self, task: ClientTask, tensors: State) -> None:
        """Write a task's private parameters, and remove those that nothing needs any more."""
        save_with_facts(tensors, {"client": task.name}, self._file(task.name, task.round))
        needed = task.last_round, task.round  # the former for a task that is done again
        for file in self._files(task.name):
            if int(file.stem) not in needed:
                file.unlink()
        shutil.rmtree(self.work_dir(task), ignore_errors=True)

    def log_of(self, client: str, log: Log) -> Log:
        """The client's steps, in its own folder: a batch may be of one sample. A task that is begun
        again is logged again."""

        def own_log(step: int, values: dict[str, float]) -> None:
            if self.main:
                self.folder(client).mkdir(parents=True, exist_ok=True)
                with open(self.folder(client) / "steps.jsonl", "a") as file:
                    file.write(json.dumps({"step": step, **values}) + "\n")

        return own_log

    def export(self, final: FinishedRun, sent: Sent, output_dir: Path) -> None:
        """A whole model for each client that has taken part, and the adapter of each task."""
        export(self, final, sent, output_dir / "tasks")

    def export_shared(self, final: FinishedRun, sent: Sent, output_dir: Path) -> None:
        if self.main:
            write_tasks(final.memory, self.config, self.tasks, output_dir / "tasks")

    def _file(self, client: str, round: int) -> Path:
        return self.folder(client) / "own" / f"{round:04d}.safetensors"

    def _files(self, client: str) -> list[Path]:
        return sorted((self.folder(client) / "own").glob("[0-9]*.safetensors"))


def _stage(round: int) -> int:
    """The first exchange is stage 1."""
    return 1 if round == 1 else 2
