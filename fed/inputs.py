"""The flags of a run, checked before anything is loaded."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from fed import methods
from fed.arguments import FedArguments
from fed.clients import ClientSpec, named
from llava.errors import InputError
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments, parse

DRIVERS = ("resident", "script")
SCRIPT_FLAGS = (
    "fed_client_command",
    "fed_client_timeout",
    "fed_client_retries",
    "fed_parallel_clients",
    "fed_min_clients",
)


def for_driver(argv: list[str]) -> list[str]:
    """The command line, to be parsed; where clients are processes, the GPUs are left to them."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("fed_driver", "fed_eval_data_path", "deepspeed"):
        peek.add_argument(f"--{flag}", nargs="?")
    first, _ = peek.parse_known_args(argv)
    if first.fed_driver != "script":
        return argv
    if first.deepspeed or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(
            "--fed_driver script is one process that starts the clients': a launcher and "
            "--deepspeed belong into the client's own command"
        )
    return argv if first.fed_eval_data_path else [*argv, "--use_cpu", "True"]


def check_flags(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
    fed_args: FedArguments,
) -> dict:
    """Refuse what no model is needed to refuse, and fill in what depends on the driver.

    Returns:
        The method's options.
    """
    if not fed_args.fed_clients:
        raise InputError("--fed_clients is missing: the YAML file that names the clients")
    for flag, instead in (("data_path", "fed_clients"), ("eval_data_path", "fed_eval_data_path")):
        if getattr(data_args, flag):
            raise InputError(f"--{flag} has no place in a federated run; --{instead} has")
    names = [Path(path).stem for path in fed_args.fed_eval_data_path]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise InputError(f"--fed_eval_data_path: two files are called {doubled.pop()}")
    if not model_args.vision_tower:
        raise InputError("--vision_tower is missing")
    if not (model_args.tune_mm_mlp_adapter or training_args.lora_enable):
        raise InputError(
            "fed.train federates the projector, --tune_mm_mlp_adapter True, or LoRA with the "
            "projector, --lora_enable True"
        )
    if model_args.unfreeze_mm_vision_tower:
        raise InputError("--unfreeze_mm_vision_tower has no place in a federated run")
    if fed_args.fed_rounds < 1:
        raise InputError(f"--fed_rounds is {fed_args.fed_rounds}, at least 1 is expected")
    for flag in (
        "fed_clients_per_round",
        "fed_eval_every",
        "fed_client_timeout",
        "fed_client_retries",
        "fed_min_clients",
    ):
        if not getattr(fed_args, flag) >= 0:
            raise InputError(f"--{flag} is {getattr(fed_args, flag)}, 0 or more is expected")
    _check_driver(fed_args)
    options = methods.parse_options(
        fed_args.fed_method, _options(fed_args.fed_method, fed_args.fed_options)
    )
    if methods.get(fed_args.fed_method).client is not None:
        _check_steps_changed(training_args, fed_args)
    return options


def check_pilot(
    specs: Sequence[ClientSpec],
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
    fed_args: FedArguments,
) -> None:
    """Refuse where Pilot's connector, method and tasks do not come together; fill in the tasks."""
    is_method, kind = fed_args.fed_method == "pilot", model_args.mm_projector_type
    if is_method != (kind == "pilot"):
        raise InputError(
            f"--fed_method pilot and --mm_projector_type pilot go together, here they are "
            f"{fed_args.fed_method} and {kind}"
        )
    if not is_method:
        if fed_args.pilot_stage1_learning_rate is not None:
            raise InputError("--pilot_stage1_learning_rate is for --fed_method pilot")
        return
    who = "--fed_method pilot"
    for flag, why in (
        ("fed_pool", "all data in one place has no tasks to keep apart"),
        ("fed_driver script", "a client's own parts are put into the model by the resident one"),
    ):
        name, _, value = flag.partition(" ")
        if getattr(fed_args, name) == (value or True):
            raise InputError(f"{who} has no place with --{flag}: {why}")
    for flag in ("pilot_tasks", "pilot_stage"):
        if getattr(model_args, flag) != getattr(ModelArguments(), flag):
            raise InputError(
                f"--{flag} has no place with {who}: tasks are in {fed_args.fed_clients}"
            )
    for spec in specs:
        if spec.task is None:
            raise InputError(f"{who}: client {spec.name} of {fed_args.fed_clients} has no `task`")
    model_args.pilot_tasks = list(dict.fromkeys(spec.task for spec in specs))


def _options(method: str, words: Sequence[str]) -> list[str]:
    """The words of --fed_options as name=value, a leading file read: its section of the method.

    What is given beside a file is stronger.
    """
    if not words or "=" in words[0] or not words[0].endswith((".yaml", ".yml")):
        return list(words)
    import yaml

    file, *words = words
    try:
        sections = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--fed_options {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--fed_options {file}: not YAML ({error})") from None
    if not isinstance(sections, dict) or not isinstance(sections.get(method), dict):
        there = ", ".join(map(str, sections)) if isinstance(sections, dict) else "none"
        raise InputError(
            f"--fed_options {file}: options under the key {method!r} are expected, "
            f"there are the keys {there}"
        )
    given = {word.partition("=")[0] for word in words}
    own = {name: value for name, value in sections[method].items() if name not in given}
    return [*(f"{name}={value}" for name, value in own.items()), *words]


def rehearse(fed_args: FedArguments, options: dict, at_work: Sequence[int]) -> None:
    """Rounds on next to nothing: find a method that cannot, or a value out of range, before anybody
    trains.

    Args:
        at_work: for each round, how many clients have samples in it.
    """
    method = methods.get(fed_args.fed_method)
    tiny = {"model.mm_projector.weight": torch.eye(2), "model.mm_projector.bias": torch.ones(2)}
    make_rule = methods.client_rule(fed_args.fed_method, options)
    sent = make_rule(tiny, {}, {}).end().extras if make_rule else {}
    sizes: dict[int, str] = {}
    for round, there in enumerate(at_work, start=1):
        drawn = min(fed_args.fed_clients_per_round or there, there)
        sizes.setdefault(drawn, f"round {round} has {drawn}")
        if 0 < fed_args.fed_min_clients < drawn:
            least = fed_args.fed_min_clients
            sizes.setdefault(least, f"--fed_min_clients lets a round go on with {least}")
    for clients, why in sizes.items():
        if not clients:  # such a round is skipped
            continue
        try:
            method(
                [tiny] * clients,
                weights=[1] * clients,
                base=tiny,
                extras=[sent] * clients,
                **options,
            )
        except InputError as error:
            raise InputError(f"{error} ({why})") from None


def _check_steps_changed(training_args: TrainingArguments, fed_args: FedArguments) -> None:
    """Refuse where a method's rule for the clients' steps would not be heard, or has no sense."""
    who = f"--fed_method {fed_args.fed_method}"
    if fed_args.fed_driver == "script":
        raise InputError(
            f"{who} changes the clients' own steps, which a script of --fed_driver script does not "
            "know of; --fed_driver resident does"
        )
    if fed_args.fed_pool:
        raise InputError(
            f"{who} has no place with --fed_pool: all data in one place is trained as it is"
        )
    for flag in ("deepspeed", "fsdp"):
        if getattr(training_args, flag):
            raise InputError(
                f"{who} changes gradients before each step, and --{flag} keeps them to itself"
            )


def _check_driver(fed_args: FedArguments) -> None:
    """The flags of the drivers, and the default of --fed_lr_schedule, which depends on them."""
    scripted = fed_args.fed_driver == "script"
    # Upstream's own training code does not know of a schedule that spans several runs.
    fed_args.fed_lr_schedule = fed_args.fed_lr_schedule or ("round" if scripted else "run")
    for flag, known in (("fed_lr_schedule", ("run", "round")), ("fed_driver", DRIVERS)):
        if getattr(fed_args, flag) not in known:
            raise InputError(
                f"--{flag} is {getattr(fed_args, flag)!r}; known are {', '.join(known)}"
            )
    if fed_args.fed_parallel_clients < 1:
        raise InputError(
            f"--fed_parallel_clients is {fed_args.fed_parallel_clients}, at least 1 is expected"
        )
    if scripted and fed_args.fed_pool:
        raise InputError("--fed_pool has no place with --fed_driver script: run the script itself")
    for flag in () if scripted else SCRIPT_FLAGS:
        if getattr(fed_args, flag) != getattr(FedArguments, flag):
            raise InputError(f"--{flag} is for --fed_driver script")


def check_round(specs: Sequence[ClientSpec], fed_args: FedArguments, options: dict) -> None:
    """Refuse to ask for more clients than there are, and a method that so many are no use to."""
    asked, there = fed_args.fed_clients_per_round, len(specs)
    if asked > there:
        raise InputError(
            f"--fed_clients_per_round is {asked}, {fed_args.fed_clients} has {there} clients"
        )
    if fed_args.fed_min_clients > (asked or there):
        raise InputError(
            f"--fed_min_clients is {fed_args.fed_min_clients}, a round has {asked or there} clients"
        )
    joined = [
        sum(spec.from_round <= round for spec in specs)
        for round in range(1, fed_args.exchanges + 1)
    ]
    rehearse(fed_args, options, [1] if fed_args.fed_pool else joined)


def arguments_of(
    spec: ClientSpec, argv: list[str], data_args: DataArguments, training_args: TrainingArguments
) -> tuple[DataArguments, TrainingArguments]:
    """The client's own arguments: the command line's, then what clients.yaml overrides."""
    with named(spec):
        if spec.overrides:
            own = [text for key, value in spec.overrides.items() for text in (f"--{key}", value)]
            model_args, data_args, training_args, _ = parse(
                [*argv, *own], ModelArguments, DataArguments, TrainingArguments, FedArguments
            )
            # What loading the session sets on the command line's own arguments.
            training_args.tune_mm_mlp_adapter = model_args.tune_mm_mlp_adapter
        _check_steps(training_args)
    return data_args, training_args


def _check_steps(args: TrainingArguments) -> None:
    """Refuse what does not go with a client's turn."""
    if args.dataloader_drop_last:
        raise InputError("--dataloader_drop_last True would drop samples that are seen only once")
    if args.eval_strategy != "no":
        raise InputError("--eval_strategy has no place in a federated run; --fed_eval_every has")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    try:
        schedule = transformers.get_scheduler(
            args.lr_scheduler_type, optimizer, 0, 10, args.lr_scheduler_kwargs
        )
        schedule.lr_lambdas  # noqa: B018
    except (TypeError, ValueError, AttributeError):
        raise InputError(
            f"--lr_scheduler_type {args.lr_scheduler_type}: a schedule over steps is expected, "
            f"with its --lr_scheduler_kwargs (found {args.lr_scheduler_kwargs})"
        ) from None
