"""The command line of a run: parsed, and refused before anything is loaded."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from fed import methods
from fed.arguments import Arguments, FedArguments, declared, own_flags
from fed.clients.clients_yaml import ClientSpec, named
from fed.clients.wire import WIRES
from fed.drivers import driver as drivers
from fed.drivers.driver import Driver
from fed.drivers.noise_shares import check_own, check_shares
from fed.methods import Method
from fed.yaml_file import read_yaml
from llava.errors import InputError
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments, parse
from llava.train.private_arguments import check_goes_with, check_privacy

LONGEST = 1e6  # of an update: beyond it, squares of it leave few digits


def driver_of(argv: Sequence[str]) -> type[Driver]:
    """The driver that a command line asks for, before it is parsed."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--fed_driver", nargs="?", default=FedArguments.fed_driver)
    return drivers.get(str(peek.parse_known_args(argv)[0].fed_driver))


def parse_arguments(argv: list[str]) -> Arguments:
    """The command line's flags, those of all methods included."""
    return Arguments(*parse(argv, *_kinds()))


def _kinds() -> tuple[type, ...]:
    """The dataclasses of the command line; FedArguments has methods' and drivers' flags, too."""
    kinds = [flags for part in _parts().values() if (flags := part.flags)]
    # A class that another one is made of comes with that one.
    whole = [kind for kind in kinds if not any(kind in other.__mro__[1:] for other in kinds)]
    bases = (FedArguments, *dict.fromkeys(whole))
    fed = dataclasses.make_dataclass("FedArguments", [], bases=bases)
    return ModelArguments, DataArguments, TrainingArguments, fed


def _parts() -> dict[str, Method | type[Driver]]:
    """All drivers and methods, by the flag that chooses them."""
    return {f"--fed_driver {name}": drivers.get(name) for name in drivers.names()} | {
        f"--fed_method {name}": methods.get(name) for name in methods.names()
    }


def check_flags(arguments: Arguments) -> tuple[Arguments, dict[str, Any]]:
    """Refuse what no model is needed to refuse.

    Returns:
        The arguments with what depends on the driver filled in, and the method's options.
    """
    model_args, data_args, training_args, fed_args = arguments
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
    kind = drivers.get(fed_args.fed_driver)
    fed_args = dataclasses.replace(
        fed_args, fed_lr_schedule=fed_args.fed_lr_schedule or kind.lr_schedule
    )
    method = methods.get(fed_args.fed_method)
    _check_numbers(fed_args)
    _check_driver(fed_args, kind)
    _check_others(fed_args, kind, method)
    options = method.parse(_options(method.name, fed_args.fed_options))
    _check_method(method, kind, arguments._replace(fed=fed_args))
    if fed_args.fed_secure:
        _check_secure(method, fed_args, options)
    _check_private(method, options, kind, arguments)
    return arguments._replace(fed=fed_args), options


def _check_numbers(fed_args: FedArguments) -> None:
    for bounds in declared(type(fed_args), "LEAST"):
        for name, least in bounds.items():
            if not (value := getattr(fed_args, name)) >= least:
                raise InputError(f"--{name} is {value}, {least} or more is expected")
    for name, known in (
        ("fed_lr_schedule", ("run", "round")),
        ("fed_wire", WIRES),
        ("fed_weighting", ("samples", "explained")),
    ):
        if (value := getattr(fed_args, name)) not in known:
            raise InputError(f"--{name} is {value!r}; known are {', '.join(known)}")


def _check_driver(fed_args: FedArguments, kind: type[Driver]) -> None:
    """Refuse flags that have no meaning with a driver."""
    who = f"--fed_driver {fed_args.fed_driver}"
    if fed_args.fed_pool and not kind.trains_here:
        raise InputError(f"--fed_pool has no place with {who}: run the script itself")
    if fed_args.fed_min_clients and not kind.may_fail:
        raise InputError(
            f"--fed_min_clients has no place with {who}: a client that fails ends the run"
        )


def _check_others(fed_args: FedArguments, kind: type[Driver], method: Method) -> None:
    """Refuse flags that are for another driver or method."""
    own = {field.name for part in (kind, method) for field in own_flags(part)}
    defaults = type(fed_args)()
    for who, part in _parts().items():
        for name in [field.name for field in own_flags(part) if field.name not in own]:
            if getattr(fed_args, name) != getattr(defaults, name):
                raise InputError(f"--{name} is for {who}")


def _check_method(method: Method, kind: type[Driver], arguments: Arguments) -> None:
    """Refuse flags and a connector of another method, and a driver that cannot do this one."""
    model_args, _, training_args, fed_args = arguments
    who = f"--fed_method {method.name}"
    for name in methods.names():
        other = methods.get(name)
        if other.connector and (other is method) != (
            model_args.mm_projector_type == other.connector
        ):
            raise InputError(
                f"--fed_method {name} and --mm_projector_type {other.connector} go together, here "
                f"they are {method.name} and {model_args.mm_projector_type}"
            )
    if method.store is not None and not (kind.trains_here or kind.clients_keep or kind.hands_over):
        raise InputError(
            f"{who} has no place with --fed_driver {fed_args.fed_driver}, which does not hand its "
            "clients' private parameters over to them"
        )
    if method.store is not None and kind.clients_keep and fed_args.fed_eval_data_path:
        raise InputError(
            f"{who} has no place with --fed_eval_data_path under --fed_driver "
            f"{fed_args.fed_driver}: a client's private parameters stay there, and without them "
            "its model cannot be measured here"
        )
    if method.client_rule is not None:
        _check_steps_changed(who, kind, training_args, fed_args)


def _check_secure(method: Method, fed_args: FedArguments, options: Mapping[str, Any]) -> None:
    """Refuse secure sums where single clients are looked at, or nothing is sent."""
    importlib.import_module("fed.privacy.keys")  # says what is to be installed
    try:
        method.summed(options)
    except InputError as error:
        raise InputError(f"--fed_secure True: {error}") from None
    if fed_args.fed_pool:
        raise InputError("--fed_secure has no place with --fed_pool: there is one client")
    if fed_args.fed_wire != "float32":
        raise InputError(
            f"--fed_wire {fed_args.fed_wire} has no place with --fed_secure: masked numbers have "
            "8 bytes each"
        )
    if fed_args.fed_driver == "resident" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(
            "--fed_secure True: the resident driver does sums in one process; a launcher has no "
            "place here"
        )
    if not 0 < fed_args.fed_secure_norm <= LONGEST:
        raise InputError(
            f"--fed_secure_norm is {fed_args.fed_secure_norm}, above 0 and at most {LONGEST:g} is "
            "expected"
        )


def _check_steps_changed(
    who: str, kind: type[Driver], training_args: TrainingArguments, fed_args: FedArguments
) -> None:
    """Refuse where a method's rule for the clients' steps would have no effect, or no sense."""
    if not (kind.trains_here or kind.clients_keep):
        raise InputError(
            f"{who} changes the clients' own steps, which a script of --fed_driver "
            f"{fed_args.fed_driver} does not know of; --fed_driver resident does"
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


def _check_private(
    method: Method, options: Mapping[str, Any], kind: type[Driver], arguments: Arguments
) -> None:
    """Refuse flags of private training that do not go together, or with driver and method."""
    fed_args = arguments.fed
    check_privacy(fed_args)
    if fed_args.fed_dp_shares:
        check_shares(method, options, fed_args, arguments.training)
    if not fed_args.private:
        return
    check_goes_with(arguments.training)
    if not (kind.trains_here or kind.clients_keep):
        raise InputError(
            f"private training is of the clients' own steps, which a script of --fed_driver "
            f"{fed_args.fed_driver} does not know of; give --fed_dp_* to the script itself"
        )
    if method.connector:
        raise InputError(
            f"--fed_method {method.name} has no place in private training: its connector adds "
            "losses over the pictures of a batch, in which no sample's part can be told"
        )
    if fed_args.fed_weighting == "explained" or method.asks_explained(options):
        option, value = method.explained_by or ("", "")
        how = f"--fed_method {method.name} with {option}={value}"
        if fed_args.fed_weighting == "explained":
            how = "--fed_weighting explained"
        raise InputError(
            f"{how} has no place in private training: clients would tell what their pictures "
            "explain, which --fed_dp_metrics off leaves out"
        )


def driver_keys() -> dict[str, str]:
    """The keys of clients.yaml that are a driver's own, with the driver's name."""
    return {key: name for name in drivers.names() for key in drivers.get(name).keys}


def _options(method: str, words: Sequence[str]) -> list[str]:
    """The words of --fed_options as name=value, a leading file read: its section of the method.

    What is given beside a file is stronger.
    """
    if not words or "=" in words[0] or not words[0].endswith((".yaml", ".yml")):
        return list(words)
    file, *words = words
    sections = read_yaml(file, "--fed_options")
    if not isinstance(sections, dict) or not isinstance(sections.get(method), dict):
        there = ", ".join(map(str, sections)) if isinstance(sections, dict) else "none"
        raise InputError(
            f"--fed_options {file}: options under the key {method!r} are expected, "
            f"there are the keys {there}"
        )
    given = {word.partition("=")[0] for word in words}
    own = {name: value for name, value in sections[method].items() if name not in given}
    return [*(f"{name}={value}" for name, value in own.items()), *words]


def rehearse(fed_args: FedArguments, options: Mapping[str, Any], counts: Sequence[int]) -> None:
    """Rounds on next to nothing: find a method that cannot, or a value out of range, before anybody
    trains.

    Args:
        counts: for each round, the number of clients that have samples in it.
    """
    method = methods.get(fed_args.fed_method)
    tiny = {"model.mm_projector.weight": torch.eye(2), "model.mm_projector.bias": torch.ones(2)}
    make_rule = method.rule(options)
    sent = make_rule(tiny, {}, {}).end().extras if make_rule else {}
    sizes: dict[int, str] = {}
    for round, count in enumerate(counts, start=1):
        drawn = min(fed_args.fed_clients_per_round or count, count)
        if fed_args.fed_secure and 0 < drawn < fed_args.fed_secure_min:
            raise InputError(
                f"--fed_secure_min is {fed_args.fed_secure_min}, round {round} has {drawn} clients"
            )
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


def check_round(
    specs: Sequence[ClientSpec], fed_args: FedArguments, options: Mapping[str, Any], rounds: int
) -> None:
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
    if all(spec.from_round > 1 for spec in specs):
        raise InputError("--fed_clients: no client has from_round 1")
    if fed_args.fed_secure and methods.get(fed_args.fed_method).summed(options).by_task:
        _check_tasks(specs, fed_args)
    joined = [sum(spec.from_round <= r for spec in specs) for r in range(1, rounds + 1)]
    rehearse(fed_args, options, [1] if fed_args.fed_pool else joined)


def _check_tasks(specs: Sequence[ClientSpec], fed_args: FedArguments) -> None:
    """Refuse secure sums of so few clients of a task that there would be none of it."""
    who, least = (
        f"--fed_method {fed_args.fed_method} has a sum of each task",
        fed_args.fed_secure_min,
    )
    if fed_args.fed_clients_per_round:
        raise InputError(
            f"--fed_clients_per_round has no place with --fed_secure: {who}, and too few of one "
            "might be drawn"
        )
    for task in dict.fromkeys(spec.task for spec in specs):
        joins = [spec.from_round for spec in specs if spec.task == task]
        first = min(joins)
        if (there := joins.count(first)) < least:
            raise InputError(
                f"--fed_secure_min is {least}: {who}, and {task} has {there} clients in round "
                f"{first}"
            )


def check_samples(fed_args: FedArguments, samples: Sequence[int], rounds: int) -> None:
    """Refuse one pass over so few samples that some rounds would have none.

    Args:
        samples: how many each client has.
    """
    most = sum(samples) if fed_args.fed_pool else max(samples)
    if fed_args.fed_one_pass and most < rounds:
        raise InputError(
            f"--fed_rounds is {rounds}, but no client has more than {most} samples: some rounds "
            "would have none (one pass sees each sample once)"
        )


def arguments_of(
    spec: ClientSpec, argv: list[str], arguments: Arguments
) -> tuple[DataArguments, TrainingArguments]:
    """The client's own arguments: the command line's, then what clients.yaml overrides."""
    _, data_args, training_args, _ = arguments
    with named(spec):
        if spec.overrides:
            own = [text for key, value in spec.overrides.items() for text in (f"--{key}", value)]
            _, data_args, training_args, _ = parse_arguments([*argv, *own])
        _check_steps(training_args)
        if arguments.fed.private:
            check_goes_with(training_args)
        if arguments.fed.fed_dp_shares:
            check_own(spec)
    return data_args, training_args


def _check_steps(args: TrainingArguments) -> None:
    """Refuse flags that do not go with a client's task."""
    if args.dataloader_drop_last:
        raise InputError("--dataloader_drop_last True would drop samples that are seen only once")
    if args.eval_strategy != "no":
        raise InputError("--eval_strategy has no place in a federated run; --fed_eval_every has")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    options: Any = args.lr_scheduler_kwargs  # a dict, once transformers has read the flag's text
    try:
        schedule = transformers.get_scheduler(args.lr_scheduler_type, optimizer, 0, 10, options)
        schedule.lr_lambdas  # noqa: B018
    except (TypeError, ValueError, AttributeError):
        raise InputError(
            f"--lr_scheduler_type {args.lr_scheduler_type}: a schedule over steps is expected, "
            f"with its --lr_scheduler_kwargs (found {args.lr_scheduler_kwargs})"
        ) from None
