"""What a run is given, read and checked before anything trains: flags, clients, data sets."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from fed import methods
from fed.arguments import FedArguments
from fed.clients import ClientSpec, seed_of, slices
from fed.drivers.resident import Client
from fed.evaluate import EvaluationSet
from llava.errors import InputError
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments, parse
from llava.train.data import LazySupervisedDataset
from llava.train.train import Session, prepare


def check_flags(
    model_args: ModelArguments, data_args: DataArguments, fed_args: FedArguments
) -> dict:
    """Refuse what no model is needed to refuse; returns the method's options."""
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
    if not model_args.tune_mm_mlp_adapter:
        raise InputError(
            "fed.train federates the projector: --tune_mm_mlp_adapter True is expected"
        )
    if fed_args.fed_rounds < 1:
        raise InputError(f"--fed_rounds is {fed_args.fed_rounds}, at least 1 is expected")
    for flag in ("fed_clients_per_round", "fed_eval_every"):
        if getattr(fed_args, flag) < 0:
            raise InputError(f"--{flag} is {getattr(fed_args, flag)}, 0 or more is expected")
    for flag, known in (("fed_lr_schedule", ("run", "round")), ("fed_driver", ("resident",))):
        if getattr(fed_args, flag) not in known:
            raise InputError(
                f"--{flag} is {getattr(fed_args, flag)!r}; known are {', '.join(known)}"
            )
    options = methods.parse_options(fed_args.fed_method, fed_args.fed_options)
    # A rehearsal on next to nothing finds a value that is out of range before anybody trains.
    tiny = {"model.mm_projector.weight": torch.eye(2), "model.mm_projector.bias": torch.ones(2)}
    methods.get(fed_args.fed_method)([tiny, tiny], weights=[1, 1], base=tiny, **options)
    return options


def arguments_of(
    spec: ClientSpec, argv: list[str], data_args: DataArguments, training_args: TrainingArguments
) -> tuple[DataArguments, TrainingArguments]:
    """The client's own arguments: the command line's, then what clients.yaml overrides."""
    with _named(spec):
        if spec.overrides:
            own = [text for key, value in spec.overrides.items() for text in (f"--{key}", value)]
            _, data_args, training_args, _ = parse(
                [*argv, *own], ModelArguments, DataArguments, TrainingArguments, FedArguments
            )
            # What loading the session sets on the command line's own arguments.
            training_args.tune_mm_mlp_adapter = True
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


def load_clients_data(
    specs: Sequence[ClientSpec],
    data_args: DataArguments,
    client_args: Sequence[tuple[DataArguments, TrainingArguments]],
    session: Session,
) -> list[LazySupervisedDataset]:
    """Every client's data set, checked whole, with its features in the cache."""
    datasets = [
        _dataset(spec, data_args, own_data_args, session)
        for spec, (own_data_args, _) in zip(specs, client_args, strict=True)
    ]
    for spec, (_, args), dataset in zip(specs, client_args, datasets, strict=True):
        # The cache holds features of one processing of the pictures; another one goes without.
        same = dataset.data_args.image_aspect_ratio == data_args.image_aspect_ratio
        cache = session.feature_cache if same else None
        with _named(spec):
            prepare(dataset, f"client {spec.name}", cache, args.world_size)
    return datasets


def _dataset(
    spec: ClientSpec, data_args: DataArguments, own: DataArguments, session: Session
) -> LazySupervisedDataset:
    own = _of_session(own, data_args)
    own.image_folder = spec.image_folder or data_args.image_folder
    with _named(spec):
        return LazySupervisedDataset(spec.data_path, session.tokenizer, own)


@contextlib.contextmanager
def _named(spec: ClientSpec):
    """An `InputError` inside says whose input it is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"client {spec.name}: {error}") from None


def _of_session(own: DataArguments, data_args: DataArguments) -> DataArguments:
    """`own` with what loading the session filled into `data_args`."""
    merged = copy.copy(own)
    flags = {f.name for f in dataclasses.fields(DataArguments)} - {"is_multimodal"}
    for name, value in vars(data_args).items():
        if name not in flags:
            setattr(merged, name, value)
    return merged


def evaluation_set(
    path: str,
    data_args: DataArguments,
    fed_args: FedArguments,
    session: Session,
    training_args: TrainingArguments,
) -> EvaluationSet:
    """A file of --fed_eval_data_path, checked whole, with its samples' domains."""
    args = copy.copy(data_args)
    args.image_folder = fed_args.fed_eval_image_folder or data_args.image_folder
    dataset = LazySupervisedDataset(path, session.tokenizer, args)
    report = prepare(dataset, f"held out, {path}", session.feature_cache, training_args.world_size)
    if report.truncated:
        raise InputError(
            f"--fed_eval_data_path {path}: {report.truncated} captions are longer than "
            f"--model_max_length {training_args.model_max_length}; cut ones cannot be measured"
        )
    keys = [record.get(fed_args.fed_eval_domain) for record in dataset.records]
    domains = None if None in keys else [str(key) for key in keys]
    return EvaluationSet(Path(path).stem, dataset, domains)


def pool(
    datasets: Sequence[LazySupervisedDataset], data_args: DataArguments, session: Session
) -> LazySupervisedDataset:
    """All clients' samples in one data set, under the command line's own arguments."""
    records = []
    for dataset in datasets:
        for i, record in enumerate(dataset.records):
            picture = dataset.picture(i)
            records.append({**record, "image": os.path.abspath(picture)} if picture else record)
    return LazySupervisedDataset(records, session.tokenizer, data_args, session.feature_cache)


def make_clients(
    specs: Sequence[ClientSpec],
    client_args: Sequence[tuple[DataArguments, TrainingArguments]],
    datasets: Sequence[LazySupervisedDataset],
    fed_args: FedArguments,
) -> list[Client]:
    """The loop's clients, each with its slices."""
    rounds = fed_args.fed_rounds
    most = max(len(dataset) for dataset in datasets)
    if fed_args.fed_one_pass and most < rounds:
        raise InputError(
            f"--fed_rounds is {rounds}, but no client has more than {most} samples: some rounds "
            "would have none (one pass sees each sample once)"
        )
    clients = []
    for spec, (_, args), dataset in zip(specs, client_args, datasets, strict=True):
        whole = list(range(len(dataset)))
        cut = slices(len(dataset), rounds, seed_of(args.seed, "slices", spec.name))
        clients.append(
            Client(spec.name, args, dataset, cut if fed_args.fed_one_pass else [whole] * rounds)
        )
    return clients
