"""What a client of Pilot has of its own, on the client's side of the run.

Of its connector a client shares the adapter of its task. The rest (`PilotConnector.private`: client
adapter, cross-task adapters, router) lies in OUTPUT/clients/NAME/, is loaded when the client's turn
begins and written when it ends, and is in nothing that is sent, nor in OUTPUT/fed/, where the
server has its files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from fed.server.client_task import Log
from fed.state import State, save
from llava.model.checkpoint import PROJECTOR_PREFIX, copies, copy_in
from llava.model.multimodal_projector.connector import TRAINED
from llava.state import read_tensors


class OwnParts:
    """The model's connector, which belongs to one client after the other.

    Args:
        model: one whose connector is `pilot`, as every client begins with it.
        root: OUTPUT/clients.
        task_of: the task of each client.
        tasks: all tasks, in the order that the run has them.
        main: whether this process writes.
    """

    def __init__(
        self,
        model: nn.Module,
        root: Path,
        task_of: Mapping[str, str],
        tasks: Sequence[str],
        main: bool = True,
    ):
        self.connector = model.get_model().mm_projector
        self.root, self.task_of, self.tasks, self.main = root, task_of, tasks, main
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

    def work_dir(self, client: str, turn: int) -> Path:
        """Where the trainer's checkpoints of a turn lie, which hold what is the client's own."""
        return self.folder(client) / f"turn-{turn:04d}"

    def put(self, client: str, beside: State, *, turn: int | None = None, after: int = 0) -> None:
        """Make the connector the client's, as its turn finds it or as a round has left it.

        Args:
            beside: the adapters of the other tasks, `TASK/model.mm_projector.NAME`. A task that
                nobody has trained yet has the adapter that everybody began with.
            turn: the number of the turn that is about to begin; from 1, the turn of stage 1.
            after: without `turn`: the number of the round that is over.
        """
        now = turn or after
        self.connector.settings.stage = 1 if now == 1 else 2
        self.connector.train_groups(*TRAINED)
        kept = self._kept(client, now if turn else now + 1)
        copy_in(kept, self.private, f"what client {client} has of its own")
        others = self._others(client, beside)
        copy_in(others, self.others, f"the other tasks' adapters sent to client {client}")

    def _kept(self, client: str, turn: int) -> State:
        """What the last turn before `turn` has left; what everybody begins with if none has."""
        files = [f for f in self._files(client) if int(f.stem) < turn]
        if files:
            return read_tensors(files[-1])
        return {name: self.initial[name] for name in self.private}

    def _others(self, client: str, beside: State) -> State:
        found = {}
        for name in self.others:
            _, _, index, rest = name.split(".", 3)
            task = self.order(client)[1 + int(index)]
            sent = beside.get(f"{task}/{PROJECTOR_PREFIX}{rest}")
            found[name] = self.initial[rest] if sent is None else sent
        return found

    def keep(self, client: str, turn: int) -> None:
        """Write what is the client's own now, after its turn; what is older than the last goes."""
        tensors = copies(self.private)
        if not self.main:
            return
        save(tensors, self.folder(client) / "own" / f"{turn:04d}.safetensors")
        for file in self._files(client)[:-2]:  # the last but one is for a turn that is done again
            file.unlink()
        shutil.rmtree(self.work_dir(client, turn), ignore_errors=True)

    def log_of(self, client: str) -> Log:
        """Its steps, for its own eyes: a batch may be of one sample. A turn that is begun again is
        logged again."""

        def log(step: int, values: dict[str, float]) -> None:
            if self.main:
                self.folder(client).mkdir(parents=True, exist_ok=True)
                with open(self.folder(client) / "steps.jsonl", "a") as file:
                    file.write(json.dumps({"step": step, **values}) + "\n")

        return log

    def _files(self, client: str) -> list[Path]:
        return sorted((self.folder(client) / "own").glob("[0-9]*.safetensors"))
