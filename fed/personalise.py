"""A new client, or a new task, after a Pilot run: only what is its own is fitted.

    python -m fed.personalise --pilot_run OUTPUT --pilot_task NAME <the flags of llava.train>

The newcomer is given what a late client of the run would be sent: the adapters of all tasks, and
the mean of the clients' LoRA. Both stay as they are. A client of a known task fits its cross-task
adapters and its router; one of a new task also the task's adapter, which starts where those of the
run did. --output_dir holds the newcomer's whole model, as OUTPUT/clients/NAME does for the others.
Killed, the same command goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import transformers

from fed import methods
from fed.form import form_of
from fed.own_parts import OwnParts
from fed.round_state import RoundState
from fed.state import check
from llava.errors import InputError, one_clear_error
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments, parse
from llava.train.resume import SayWhereItBegins, record, starting_point
from llava.train.session import load_session
from llava.train.settings import fingerprint, training_settings
from llava.train.train import make_supervised_data_module, make_trainer, prepare, prepare_output

NEWCOMER = "newcomer"


@dataclass
class PersonaliseArguments:
    pilot_run: str | None = field(default=None, metadata={"help": "--output_dir of a Pilot run."})
    pilot_task: str | None = field(default=None, metadata={"help": "The newcomer's task."})


def personalise(argv: Sequence[str] | None = None) -> None:
    """Fit a newcomer's own parts. Bad input is found before anything trains."""
    argv = list(sys.argv[1:] if argv is None else argv)
    model_args, data_args, training_args, own_args = parse(
        argv, ModelArguments, DataArguments, TrainingArguments, PersonaliseArguments
    )
    run = _read_run(model_args, own_args)
    known = list(dict.fromkeys(name.partition("/")[0] for name in run.memory))
    task = own_args.pilot_task
    model_args.pilot_tasks = [task, *(other for other in known if other != task)]
    training_args.prediction_loss_only = True
    prepare_output(training_args)
    settings = training_settings(model_args, data_args, training_args)
    settings |= {
        "--pilot_task": task,
        "the content of --pilot_run": fingerprint(_state_file(own_args)),
    }
    checkpoint = starting_point(training_args, settings)
    session = load_session(model_args, data_args, training_args)
    state, beside = methods.get("pilot").send(NEWCOMER, task, run.personal, run.shared, run.memory)

    form = form_of(session.model)
    check(state, form.of_model(session.model), who=f"--pilot_run {own_args.pilot_run}")
    form.into_model(session.model, state, f"--pilot_run {own_args.pilot_run}")
    own = OwnParts(session.model, Path(training_args.output_dir), {NEWCOMER: task}, [task, *known])
    own.put(NEWCOMER, beside, turn=2)
    for parameter in session.model.parameters():
        parameter.requires_grad_(False)
    own.connector.train_groups("client", *(() if task in known else ("task",)))
    trained = sum(p.numel() for p in session.model.parameters() if p.requires_grad)
    if not trained:
        raise InputError(
            f"--pilot_run {own_args.pilot_run}: it has one task, {task}: nothing to fit"
        )
    kind = "a client of the known" if task in known else "the new"
    print(f"{kind} task {task}: {trained} parameters train", flush=True)

    data = make_supervised_data_module(session.tokenizer, data_args)
    for name, title in (("train_dataset", "training"), ("eval_dataset", "validation")):
        if data[name] is not None:
            prepare(data[name], title, session.feature_cache, training_args.world_size)
    trainer = make_trainer(session, training_args, callbacks=[SayWhereItBegins()], **data)
    record(training_args, settings)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_state()
    session.model.config.use_cache = True
    trainer.save_model()
    print(f"wrote {training_args.output_dir}", flush=True)


def _read_run(model_args: ModelArguments, own_args: PersonaliseArguments) -> RoundState:
    """The server's state of a Pilot run."""
    for flag in ("pilot_run", "pilot_task"):
        if not getattr(own_args, flag):
            raise InputError(f"--{flag} is missing")
    if model_args.mm_projector_type != "pilot":
        raise InputError(
            f"--mm_projector_type is {model_args.mm_projector_type!r}, `pilot` is expected here"
        )
    file = _state_file(own_args)
    if not file.is_file():
        raise InputError(f"--pilot_run {own_args.pilot_run}: there is no fed/state.safetensors")
    run = RoundState.load(file)
    if run.settings.get("--fed_method") != "pilot" or not run.memory:
        found = run.settings.get("--fed_method")
        raise InputError(
            f"--pilot_run {own_args.pilot_run}: a Pilot run with a finished round is expected, "
            f"this is {found!r} after round {run.round}"
        )
    return run


def _state_file(own_args: PersonaliseArguments) -> Path:
    return Path(own_args.pilot_run) / "fed" / "state.safetensors"


def main() -> None:
    with one_clear_error():
        transformers.logging.set_verbosity_error()
        personalise()


if __name__ == "__main__":
    main()
