"""The resident driver: one backbone stays in memory and clients use what trains one after another.

K clients × R rounds cost one model load. Each task is LLaVA's own trainer with the client's own
arguments, on the slice of its shard that the round sees.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import logging
import os
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers.trainer_callback import TrainerCallback

from fed.clients import reliability
from fed.clients.clients_yaml import ClientSpec
from fed.clients.measures import explained_share
from fed.clients.slices import cut, seed_of
from fed.clients.store import ClientStore
from fed.clients.task import ClientTask, Log
from fed.clients.update import Update, load_update, save_update
from fed.clients.wire import carried
from fed.drivers.client_steps import ClientSteps
from fed.drivers.driver import Driver, Run, driver
from fed.drivers.flags import ParallelFlags
from fed.drivers.private_clients import PrivateClients, guarantees
from fed.drivers.resident_data import load_clients_data, pool
from fed.drivers.worker_group import WorkerGroup, join
from fed.state import State
from llava.errors import InputError
from llava.json_files import read_json
from llava.model.checkpoint import gathered
from llava.model.trainable_part import trained_part
from llava.train.arguments import TrainingArguments, check_deepspeed, modernise
from llava.train.data import DataCollatorForSupervisedDataset, LazySupervisedDataset
from llava.train.llava_trainer import LLaVATrainer, last_checkpoint, steps_of
from llava.train.optimizer_copy import StartInFloat32, float32_copies
from llava.train.private_model import check_model
from llava.train.private_run import check_records
from llava.train.private_trainer import PrivateTrainer
from llava.train.session import Session, load_session
from llava.train.settings import deciding_flags
from llava.train.train import make_trainer
from llava.transformers_private import release

logger = logging.getLogger(__name__)


@dataclass
class Client:
    """A client on this machine: name, arguments, data, and which slice of it a round sees."""

    name: str
    args: TrainingArguments
    dataset: LazySupervisedDataset
    slices: list[list[int]]

    def samples(self, round: int) -> int:
        """The number of samples that round `round` (from 1) trains on."""
        return len(self.slices[round - 1])

    def steps(self, round: int) -> int:
        """The number of optimizer steps that round `round` takes."""
        return steps_of(self.args, self.samples(round))


@driver("resident")
class ResidentDriver(Driver):
    """Runs clients' tasks on one `Session`, one after another; in a group, each process some."""

    trains_here = True
    flags = ParallelFlags

    session: Session
    datasets: list[LazySupervisedDataset]

    def __init__(self, run: Run):
        args = run.arguments
        self.session = load_session(*args[:3])
        model = self.session.model
        part, self.initial = trained_part(model)
        if run.method.store is None:
            self.store = ClientStore(part, model.config, run.main)
        else:
            self.store = run.method.store(model, part, run)
        self.part = self.store.part
        if self.part is not part:  # the store keeps some of what trains
            self.initial = self.part.of_model(model)
        self.group = run.group
        self.writes_updates = not self.group.alone
        in_folder = args.data.feature_cache not in ("memory", "off")
        with self.group.main_first() if in_folder else contextlib.nullcontext():
            self.datasets = load_clients_data(run.specs, args.data, run.client_args, self.session)
        self.clients = self._clients(run)
        self.private = self._private(run)
        self.collator = DataCollatorForSupervisedDataset(self.session.tokenizer)
        self.schedule, self.wire = args.fed.fed_lr_schedule, args.fed.fed_wire
        self.explains = run.explains
        self.log_of = run.log_of
        self._lines: list[tuple[int, dict[str, float]]] = []
        self.rule = run.method.rule(run.options)
        extract_model_from_parallel(self.session.model)  # imports what the first task would import
        # Each task's trainer collects garbage; what lives as long as the run need not be searched.
        gc.collect()
        gc.freeze()

    @classmethod
    def join(cls, argv: list[str]) -> WorkerGroup:
        """The launcher's processes, if each is to train clients of its own."""
        peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        for flag in ("fed_parallel_clients", "deepspeed", "fsdp", "use_cpu"):
            peek.add_argument(f"--{flag}", nargs="?")
        first, _ = peek.parse_known_args(argv)
        asked, there = first.fed_parallel_clients or "1", int(os.environ.get("WORLD_SIZE", 1))
        if not asked.isdecimal() or int(asked) <= 1:
            return WorkerGroup()
        flag = f"--fed_parallel_clients {asked}"
        if int(asked) != there:
            raise InputError(
                f"{flag} with --fed_driver resident is for {asked} processes, `torchrun "
                f"--nproc_per_node {asked} -m fed.train …`, found {there}"
            )
        if first.fsdp or _zero_stage(argv) == 3:
            raise InputError(
                f"{flag} gives each process a whole model, and "
                f"{'--fsdp' if first.fsdp else '--deepspeed with ZeRO-3'} cuts one over all of "
                "them; leave out one of the two"
            )
        return join(there, on_gpu=str(first.use_cpu).lower() not in ("true", "1", "yes"))

    def _clients(self, run: Run) -> list[Client]:
        specs, datasets = run.specs, self.datasets
        args = [args for _, args in run.client_args]
        training, fed = run.arguments.training, run.arguments.fed
        if fed.fed_pool:
            specs, args = [ClientSpec("pool", "")], [training]
            datasets = [pool(datasets, run.arguments.data, self.session)]
        cuts = cut(
            specs,
            [len(dataset) for dataset in datasets],
            run.rounds,
            one_pass=fed.fed_one_pass,
            seed=training.seed,
        )
        return [
            Client(spec.name, client_args, dataset, slices)
            for spec, client_args, dataset, slices in zip(specs, args, datasets, cuts, strict=True)
        ]

    def _private(self, run: Run) -> PrivateClients | None:
        """The clients' private training, where it is asked for."""
        if not run.arguments.fed.private:
            return None
        check_model(self.session.model)
        for dataset in self.datasets:
            check_records(dataset)
        clients = cast(Any, self.clients)
        stated = guarantees(run, clients, self.datasets)
        model_args, data_args = run.arguments[:2]
        flags = {c.name: deciding_flags([model_args, data_args, c.args]) for c in clients}
        return PrivateClients(stated, run.output_dir, flags)

    def run(
        self, tasks: Sequence[ClientTask], go_on: Callable[[], bool]
    ) -> Generator[tuple[ClientTask, Update], None, None]:
        if self.group.alone:
            for task in tasks:
                yield task, self._carried(task)
        else:
            yield from self._side_by_side(tasks)

    def _side_by_side(
        self, tasks: Sequence[ClientTask]
    ) -> Generator[tuple[ClientTask, Update], None, None]:
        """Train those tasks that no other process of the group takes; the main one gives all."""
        ordered = sorted(tasks, key=lambda task: -task.client.steps(task.round))  # longest first
        waiting = dict(enumerate(ordered))
        while waiting:
            if (number := self.group.take(len(ordered))) is not None:
                task, self._lines = waiting.pop(number), []
                update = self._carried(task)
                save_update(update, task.update_file)
                self.group.tell(number, json.dumps(self._lines, default=float))
                yield task, update
            elif self.group.main:
                self.group.rest()
            else:
                return
            done = {n: lines for n in waiting if (lines := self.group.told(n)) is not None}
            for number, lines in done.items() if self.group.main else ():
                task = waiting.pop(number)
                for step, values in json.loads(lines):
                    self.log_of(task.name)(step, values)
                yield task, load_update(task.update_file)

    def _carried(self, task: ClientTask) -> Update:
        """A task's update as a server on another machine would have it."""
        return carried(self.fit(task), task.state, self.wire, f"client {task.name}")

    def fit(self, task: ClientTask) -> Update:
        """Train the task's client from the state that it was sent, on its slice of the round.

        A task that was cut short goes on from the trainer's own checkpoints (--save_strategy).

        Returns:
            The update; `metrics` has `loss` (mean over the steps), `steps`, `seconds` between the
            first and the last step, `parameters`: how many numbers were trained, sent to the client
            (`received`) and sent by it, and, where it is asked for, `explained`. In private
            training what follows from the data without noise, `loss` and `seconds`, is left out.
        """
        client, model = task.client, self.session.model
        start = dict(self.store.enter(task) or {})
        self.part.into_model(model, task.state, f"the state sent to client {client.name}")
        samples = client.samples(task.round)
        if samples == 0:
            return Update(task.state, 0, {"loss": None, "steps": 0, "seconds": 0.0})
        shared = self.part.parameters(model)
        start |= {shared[name]: tensor for name, tensor in task.state.items()}
        before = sum(client.steps(round) for round in range(1, task.round))
        title = f"round {task.round} client {client.name}"
        log = self.store.log_of(client.name, self._log_of(client.name))
        how: dict[str, Any] = {}
        if self.private is not None:
            how = {"kind": PrivateTrainer, "private": self.private.steps(task)}
            log = _without_loss(log)
        watch = _Watch(title, before, log, self.private is None)
        trainer = make_trainer(
            self.session,
            self._arguments(task),
            **how,
            train_dataset=client.dataset.select(client.slices[task.round - 1]),
            data_collator=self.collator,
            callbacks=[watch, StartInFloat32(start)],
            progress=False,
        )
        checkpoint = last_checkpoint(str(trainer.args.output_dir))
        steps = self._steps(task, trainer, checkpoint)
        result = trainer.train(resume_from_checkpoint=checkpoint)
        loss = result.training_loss
        if checkpoint:  # that was the mean since then; the log goes back to the task's beginning
            losses = [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]
            loss = sum(losses) / len(losses) if losses else loss
        trained = float32_copies(shared)
        self.store.leave(task)
        release(trainer)
        metrics = {"loss": loss, "steps": result.global_step, "seconds": watch.seconds}
        if self.private is not None:  # --fed_dp_metrics off
            metrics = {"steps": result.global_step}
        update = Update(trained, samples, metrics)
        if steps is not None:
            steps.finish(update)
        metrics["parameters"] = {
            "trained": _trained_numbers(model),
            "received": _numbers(task.state) + _numbers(task.extras),
            "sent": _numbers(update.state) + _numbers(update.extras),
        }
        if self.explains:
            metrics["explained"] = self._explained(task)
        return update

    def _explained(self, task: ClientTask) -> dict[str, float]:
        """What the pictures of the slice explain to the model as the task has left it."""
        client, model = task.client, self.session.model
        seed = seed_of(client.args.seed, "explained", client.name, task.round)
        indices = reliability.drawn(client.slices[task.round - 1], seed)
        model.eval()
        with gathered(model.parameters()):  # the trainer's engine is gone
            found = explained_share(
                model,
                client.dataset,
                self.collator,
                client.args.per_device_train_batch_size,
                client.args.device,
                indices,
            )
        return found._asdict()

    def _log_of(self, name: str) -> Log:
        """The run's taker of a client's logs; of a process that only trains, a list to be sent."""
        return self.log_of(name) if self.group.main else lambda *line: self._lines.append(line)

    def _arguments(self, task: ClientTask) -> TrainingArguments:
        """The client's arguments for the task."""
        client, spans = task.client, self.schedule == "run"
        return dataclasses.replace(
            client.args,
            output_dir=str(self.store.work_dir(task)),
            seed=seed_of(client.args.seed, client.name, task.round),
            report_to=[],
            schedule_samples=[len(indices) for indices in client.slices] if spans else [],
            schedule_round=task.round,
            **self.store.changed_arguments(task.round),
        )

    def _steps(
        self, task: ClientTask, trainer: LLaVATrainer, checkpoint: str | None
    ) -> ClientSteps | None:
        """The method's rule within the trainer, where it has one."""
        if self.rule is None:
            return None
        parameters = self.part.parameters(self.session.model)
        steps = ClientSteps(self.rule, parameters, task.extras, task.kept)
        trainer.add_callback(steps)
        if checkpoint:
            steps.go_on_from(checkpoint)
        return steps


def _without_loss(log: Log) -> Log:
    """The taker of a client's logs, told all but what was measured on its data."""
    return lambda step, values: log(step, {k: v for k, v in values.items() if k != "loss"})


def _zero_stage(argv: list[str]) -> int:
    """The ZeRO stage of the file of --deepspeed; 0 without one."""
    file = check_deepspeed(modernise(argv))
    settings = read_json(Path(file)) if file else {}
    return (settings.get("zero_optimization") or {}).get("stage", 0)


def _trained_numbers(model: nn.Module) -> int:
    """Of all ranks together: ZeRO-3 leaves next to nothing of a parameter on each."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return sum(getattr(p, "ds_numel", p.numel()) for p in trained)


def _numbers(state: State) -> int:
    return sum(tensor.numel() for tensor in state.values())


class _Watch(TrainerCallback):
    """Times the steps, hands logs on, and says every ten seconds how far a long task is."""

    def __init__(self, title: str, before: int, log: Log, shows_loss: bool = True):
        self.title, self.before, self.log, self.seconds = title, before, log, 0.0
        self.shows_loss = shows_loss
        self._begun = self._spoken = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._begun = self._spoken = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds = time.perf_counter() - self._begun

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in (logs or {}):
            return
        shown = {key: logs[key] for key in ("loss", "learning_rate", "grad_norm") if key in logs}
        self.log(self.before + state.global_step, shown)
        if state.is_world_process_zero and time.perf_counter() - self._spoken > 10:
            self._spoken = time.perf_counter()
            loss = f" loss {logs['loss']:.4f}" if self.shows_loss else ""
            logger.info("%s: step %d/%d%s", self.title, state.global_step, state.max_steps, loss)
