"""What a run is made of, by driver: clients with their data, the driver, where it starts from."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from fed import state
from fed.arguments import FedArguments
from fed.client_process import check_command, split_command
from fed.clients import ClientSpec, named, seed_of, slices
from fed.drivers.resident import Client, ResidentDriver
from fed.drivers.script import ScriptClient, ScriptDriver
from fed.evaluate import EvaluationSet
from fed.form import Form, ProjectorForm, form_of
from fed.logger import RunLogger
from fed.methods import ClientRule
from fed.own_parts import OwnParts
from fed.state import State
from fed.turns import FitMany
from llava.errors import InputError
from llava.model.checkpoint import PROJECTOR_PREFIX
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.train.data import (
    DataCollatorForSupervisedDataset,
    LazySupervisedDataset,
    load_records,
)
from llava.train.preprocess import says_nothing
from llava.train.session import Session, load_session, training_config
from llava.train.train import prepare

Arguments: TypeAlias = tuple[ModelArguments, DataArguments, TrainingArguments, FedArguments]


@dataclass
class Setup:
    """Args:
    clients: the loop's clients.
    datasets: the records of each client of clients.yaml.
    form: what `initial`, the state to start from, is on disk and in a model.
    config: of the model that trains; ends in config.json.
    session: None where this process needs no model.
    own: the clients' own parts, where they have some.
    """

    clients: Sequence[Client] | Sequence[ScriptClient]
    datasets: Sequence[Sequence]
    fit_many: FitMany
    form: Form
    initial: State
    config: object
    session: Session | None
    own: OwnParts | None = None


def resident(
    specs: Sequence[ClientSpec],
    client_args: Sequence[tuple[DataArguments, TrainingArguments]],
    arguments: Arguments,
    logger: RunLogger,
    rule: Callable[..., ClientRule] | None = None,
) -> Setup:
    """One model, on which clients take turns; `rule` as `methods.client_rule` gives it."""
    model_args, data_args, training_args, fed_args = arguments
    session = load_session(*arguments[:3])
    own = None
    if model_args.mm_projector_type == "pilot":
        own = OwnParts(
            session.model,
            Path(training_args.output_dir) / "clients",
            {spec.name: spec.task for spec in specs},
            model_args.pilot_tasks,
            main=training_args.process_index == 0,
        )
    datasets = load_clients_data(specs, data_args, client_args, session)
    if fed_args.fed_pool:
        everything = [pool(datasets, data_args, session)]
        common = [(data_args, training_args)]
        clients = make_clients([ClientSpec("pool", "")], common, everything, fed_args)
    else:
        clients = make_clients(specs, client_args, datasets, fed_args)
    collator = DataCollatorForSupervisedDataset(session.tokenizer)
    driver = ResidentDriver(
        session,
        collator,
        fed_args.fed_lr_schedule,
        own.log_of if own else logger.of_client,
        rule,
        own,
        fed_args.pilot_stage1_learning_rate,
    )
    form, initial = _trained_part(session)
    config = session.model.config
    return Setup(clients, datasets, driver.fit_many, form, initial, config, session, own)


def scripted(specs: Sequence[ClientSpec], arguments: Arguments, logger: RunLogger) -> Setup:
    """A process a client; a model of its own only to draw a state to start from, or to measure."""
    model_args, data_args, training_args, fed_args = arguments
    clients = make_script_clients(specs, data_args, training_args, fed_args)
    session = None
    if _is_projector_in_a_file(model_args, training_args) and not fed_args.fed_eval_data_path:
        config, form = training_config(*arguments[:3]), ProjectorForm()
        initial = _read_initial(config, model_args.pretrain_mm_mlp_adapter)
    else:
        session = load_session(*arguments[:3])
        config = session.model.config
        form, initial = _trained_part(session)
    driver = ScriptDriver(
        Path(training_args.output_dir),
        form,
        schedule=fed_args.fed_lr_schedule,
        timeout=fed_args.fed_client_timeout,
        retries=fed_args.fed_client_retries,
        parallel=fed_args.fed_parallel_clients,
        log_of=logger.of_client,
    )
    datasets = [client.records for client in clients]
    session = session if fed_args.fed_eval_data_path else None
    return Setup(clients, datasets, driver.fit_many, form, initial, config, session)


def _trained_part(session: Session) -> tuple[Form, State]:
    form = form_of(session.model)
    initial = form.of_model(session.model)
    state.check(initial, initial, who="the state to start from")
    return form, initial


def _is_projector_in_a_file(model_args: ModelArguments, training_args: TrainingArguments) -> bool:
    """Whether the state to start from is there without a model."""
    return bool(
        model_args.pretrain_mm_mlp_adapter
        and not training_args.lora_enable
        and "unpad" not in model_args.mm_patch_merge_type  # with it goes a newline token
    )


def _read_initial(config, file: str) -> State:
    """The projector of a file, float32, checked without a model."""
    with torch.device("meta"):
        like = build_vision_projector(config).state_dict()
    own = {n: t.float() for n, t in state.load(file).items() if n.startswith(PROJECTOR_PREFIX)}
    state.check(own, {PROJECTOR_PREFIX + name: t for name, t in like.items()}, who=file)
    return own


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
        with named(spec):
            prepare(dataset, f"client {spec.name}", cache, args.world_size)
    return datasets


def _dataset(
    spec: ClientSpec, data_args: DataArguments, own: DataArguments, session: Session
) -> LazySupervisedDataset:
    own = _of_session(own, data_args)
    own.image_folder = spec.image_folder or data_args.image_folder
    with named(spec):
        return LazySupervisedDataset(spec.data_path, session.tokenizer, own)


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
            paths = [os.path.abspath(path) for path in dataset.paths(i)]
            records.append({**record, "image": paths} if paths else record)
    return LazySupervisedDataset(records, session.tokenizer, data_args, session.feature_cache)


def make_clients(
    specs: Sequence[ClientSpec],
    client_args: Sequence[tuple[DataArguments, TrainingArguments]],
    datasets: Sequence[LazySupervisedDataset],
    fed_args: FedArguments,
) -> list[Client]:
    """The loop's clients, each with its slices."""
    cuts = _cut(specs, datasets, client_args[0][1].seed, fed_args)
    return [
        Client(spec.name, args, dataset, cut)
        for spec, (_, args), dataset, cut in zip(specs, client_args, datasets, cuts, strict=True)
    ]


def make_script_clients(
    specs: Sequence[ClientSpec],
    data_args: DataArguments,
    training_args: TrainingArguments,
    fed_args: FedArguments,
) -> list[ScriptClient]:
    """The loop's clients where each is a process; their commands and records are checked."""
    common = fed_args.fed_client_command
    if common is not None:
        common = split_command(common, "--fed_client_command")
    commands, records = [], []
    for spec in specs:
        with named(spec):
            commands.append(_own_command(spec, common))
            records.append(_teaching(spec))
    cuts = _cut(specs, records, training_args.seed, fed_args)
    return [
        ScriptClient(
            spec.name,
            command,
            own_records,
            cut,
            seed=training_args.seed,
            image_folder=spec.image_folder or data_args.image_folder,
            process=spec.process,
        )
        for spec, command, own_records, cut in zip(specs, commands, records, cuts, strict=True)
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
        print(
            f"client {spec.name}: {len(kept)} samples, {left_out} left out: "
            "their answers are empty",
            flush=True,
        )
    return kept


def _own_command(spec: ClientSpec, common: tuple[str, ...] | None) -> list[str]:
    command = spec.process.command or common
    if command is None:
        raise InputError("it has no `command`, and there is no --fed_client_command")
    path = spec.process.environment(os.environ).get("PATH", os.defpath)
    check_command(command, spec.process.cwd, path, "its command")
    return [*command, *(word for k, v in spec.overrides.items() for word in (f"--{k}", v))]


def _cut(
    specs: Sequence[ClientSpec], datasets: Sequence[Sequence], seed: int, fed_args: FedArguments
) -> list[list[list[int]]]:
    """For each client the indices of its samples that each round sees."""
    rounds = fed_args.exchanges
    most = max(len(dataset) for dataset in datasets)
    absent = [[[]] * min(spec.from_round - 1, rounds) for spec in specs]
    if min(map(len, absent)) > 0:
        raise InputError(f"{fed_args.fed_clients}: no client has from_round 1")
    if not fed_args.fed_one_pass:
        return [
            [*away, *[list(range(len(dataset)))] * (rounds - len(away))]
            for away, dataset in zip(absent, datasets, strict=True)
        ]
    if most < rounds:
        raise InputError(
            f"--fed_rounds is {rounds}, but no client has more than {most} samples: some rounds "
            "would have none (one pass sees each sample once)"
        )
    return [
        [*away, *slices(len(dataset), rounds - len(away), seed_of(seed, "slices", spec.name))]
        for spec, away, dataset in zip(specs, absent, datasets, strict=True)
    ]
