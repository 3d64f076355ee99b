"""A new client, or a new task, after a Pilot run: only what is its own is fitted.

    python -m fed.personalise --pilot_run OUTPUT --pilot_task NAME <the flags of llava.train>

The newcomer is given what a late client of the run would be sent: the adapters of all tasks, and
the mean of the clients' LoRA. Both stay as they are. A client of a known task fits its cross-task
adapters and its router; one of a new task also the task's adapter, which starts where those of the
run did. --output_dir holds the newcomer's whole model, as OUTPUT/clients/NAME does for the others.
Killed, the same command goes on.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from fed.clients.store import FinishedRun
from fed.methods.pilot.private_parameters import PrivateParameters
from fed.methods.pilot.refusals import refuse_own_tasks
from fed.methods.pilot.send import send
from fed.state import check
from llava.errors import InputError
from llava.folder_lock import sole_run
from llava.model.trainable_part import trainable_part
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments, parse
from llava.train.distributed import start_process_group
from llava.train.resume import SayWhereItBegins, record, starting_point
from llava.train.session import load_session
from llava.train.settings import fingerprint, training_settings
from llava.train.train import make_supervised_data_module, make_trainer, prepare, prepare_output

logger = logging.getLogger(__name__)

NEWCOMER = "newcomer"
STATE_FILE = "fed/state.safetensors"


@dataclass
class PersonaliseArguments:
    pilot_run: str | None = field(default=None, metadata={"help": "--output_dir of a Pilot run."})
    pilot_task: str | None = field(default=None, metadata={"help": "The newcomer's task."})


def personalise(argv: Sequence[str], read: Callable[[Path], FinishedRun]) -> None:
    """Fit a newcomer's private parameters. Bad input is found before anything trains.

    `read` gives the state of a run that lies in a file.
    """
    start_process_group(argv)
    model_args, data_args, training_args, own_args = parse(
        [*argv, "--prediction_loss_only", "True"],
        ModelArguments,
        DataArguments,
        TrainingArguments,
        PersonaliseArguments,
    )
    folder, task = _checked(model_args, own_args)
    run = _read_run(folder, read)
    known = list(dict.fromkeys(name.partition("/")[0] for name in run.memory))
    tasks = [task, *(other for other in known if other != task)]
    model_args = dataclasses.replace(cast(Any, model_args), pilot_tasks=tasks)
    prepare_output(training_args)
    with sole_run(training_args.output_dir, main=training_args.process_index == 0):
        _fit(folder, task, known, run, model_args, data_args, training_args)


def _fit(
    folder: Path,
    task: str,
    known: list[str],
    run: FinishedRun,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
) -> None:
    """Fit them to the state of a finished run that lies in `folder`; `known` are its tasks."""
    settings = training_settings(model_args, data_args, training_args)
    settings |= {
        "--pilot_task": task,
        "the content of --pilot_run": fingerprint(folder / STATE_FILE),
    }
    checkpoint = starting_point(training_args, settings)
    session = load_session(model_args, data_args, training_args)
    state, extras = send(NEWCOMER, task, run.personal, run.shared, run.memory)

    part = trainable_part(session.model)
    check(state, part.of_model(session.model), who=f"--pilot_run {folder}")
    part.into_model(session.model, state, f"--pilot_run {folder}")
    root = Path(training_args.output_dir)
    own = PrivateParameters(session.model, root, {NEWCOMER: task}, [task, *known], part)
    own.visit(NEWCOMER, extras, round=2)
    for parameter in session.model.parameters():
        parameter.requires_grad_(False)
    own.connector.train_groups("client", *(() if task in known else ("task",)))
    trained = sum(p.numel() for p in session.model.parameters() if p.requires_grad)
    if not trained:
        why = f"it has one task, {task}" if set(known) <= {task} else "--pilot_mixture is False"
        raise InputError(f"--pilot_run {folder}: {why}, so there is nothing to fit")
    kind = "a client of the known" if task in known else "the new"
    logger.info("%s task %s: %d parameters train", kind, task, trained)

    data = make_supervised_data_module(session.tokenizer, data_args, session.sample_format)
    for name, title in (("train_dataset", "training"), ("eval_dataset", "validation")):
        if data[name] is not None:
            prepare(data[name], title, session.feature_cache, training_args.world_size)
    trainer = make_trainer(session, training_args, callbacks=[SayWhereItBegins()], **data)
    record(training_args, settings)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_state()
    session.model.config.use_cache = True
    trainer.save_model()
    logger.info("wrote %s", training_args.output_dir)


def _checked(model_args: ModelArguments, own_args: PersonaliseArguments) -> tuple[Path, str]:
    """The run's --output_dir and the newcomer's task."""
    if not own_args.pilot_run:
        raise InputError("--pilot_run is missing")
    if not own_args.pilot_task:
        raise InputError("--pilot_task is missing")
    if model_args.mm_projector_type != "pilot":
        raise InputError(
            f"--mm_projector_type is {model_args.mm_projector_type!r}, `pilot` is expected here"
        )
    refuse_own_tasks(model_args, "fed.personalise", "tasks and stage are those of --pilot_run")
    return Path(own_args.pilot_run), own_args.pilot_task


def _read_run(folder: Path, read: Callable[[Path], FinishedRun]) -> FinishedRun:
    """The server's state of a Pilot run."""
    if not (folder / STATE_FILE).is_file():
        raise InputError(f"--pilot_run {folder}: there is no {STATE_FILE}")
    run = read(folder / "fed")
    if run.settings.get("--fed_method") != "pilot" or not run.memory:
        found = run.settings.get("--fed_method")
        raise InputError(
            f"--pilot_run {folder}: a Pilot run with a finished round is expected, "
            f"this is {found!r} after round {run.round}"
        )
    return run
