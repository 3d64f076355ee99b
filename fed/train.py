"""Federated training: `python -m fed.train` with all flags of `llava/train/train.py` and `--fed_*`.

Leaves `mm_projector.bin` and `config.json` (a projector-only LLaVA checkpoint), `rounds.jsonl` (one
JSON object a round) and `fed/` (what resuming needs) in --output_dir. A method that gives each
client a state of its own leaves `clients/NAME/` checkpoints instead.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    TrainerControl,
    TrainerState,
)

from fed import methods, state
from fed.arguments import CLIENT_FLAGS, FedArguments
from fed.clients import ClientSpec, load_clients, seed_of, slices
from fed.drivers.resident import Client, ResidentDriver
from fed.evaluate import EvaluationSet, evaluate
from fed.rounds import Loop, RoundState
from llava.errors import InputError, one_clear_error
from llava.model.checkpoint import PROJECTOR_FILE, load_projector, projector_state, write_config
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments, parse
from llava.train.data import DataCollatorForSupervisedDataset, LazySupervisedDataset
from llava.train.train import Session, load_session, prepare, prepare_output

# Flags that do not decide the result: a run may be continued with others.
_FREE = re.compile(
    "output_dir|cache_dir|run_name|report_to|disable_tqdm|local_rank|use_cpu|feature_cache.*|"
    "trackio.*|per_device_eval_batch_size|attn_implementation|(logging|log|save|eval|dataloader|"
    "hub|push|ddp|torchdynamo|torch_compile|skip_memory|include)_.*|_.*|.*process_group.*|"
    "fed_(clients|options|driver|eval_.*)"
)


def train(argv: Sequence[str] | None = None) -> None:
    """One federated run, from flags to checkpoint. Bad input is found before anything trains."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = parse(argv, ModelArguments, DataArguments, TrainingArguments, FedArguments)
    model_args, data_args, training_args, fed_args = arguments
    options = _check(model_args, data_args, fed_args)
    specs = load_clients(fed_args.fed_clients, CLIENT_FLAGS)
    if fed_args.fed_clients_per_round > len(specs):
        raise InputError(
            f"--fed_clients_per_round is {fed_args.fed_clients_per_round}, "
            f"{fed_args.fed_clients} has {len(specs)} clients"
        )
    client_args = [_arguments_of(spec, argv, data_args, training_args) for spec in specs]
    logger = _Logger(training_args, prepare_output(training_args))

    session = load_session(model_args, data_args, training_args)
    datasets = [
        _dataset(spec, data_args, own_data_args, session)
        for spec, (own_data_args, _) in zip(specs, client_args, strict=True)
    ]
    for spec, dataset in zip(specs, datasets, strict=True):
        # The cache holds features of one processing of the pictures; another one goes without.
        same = dataset.data_args.image_aspect_ratio == data_args.image_aspect_ratio
        cache = session.feature_cache if same else None
        with _of(spec):
            prepare(dataset, f"client {spec.name}", cache, training_args.world_size)
    evaluation_sets = [
        _evaluation_set(path, data_args, fed_args, session, training_args)
        for path in fed_args.fed_eval_data_path
    ]
    clients = _clients(specs, client_args, datasets, fed_args)
    if fed_args.fed_pool:
        everything = _pool(datasets, data_args, session)
        whole = [ClientSpec("pool", "")], [(data_args, training_args)], [everything]
        clients = _clients(*whole, fed_args)

    collator = DataCollatorForSupervisedDataset(session.tokenizer, data_args.image_tokens)
    driver = ResidentDriver(session, collator, fed_args.fed_lr_schedule)

    def measure(global_state: state.State) -> dict:
        load_projector(session.model, global_state, "the aggregated state")
        session.model.eval()
        return {
            data.name: evaluate(
                session.model,
                data,
                collator,
                training_args.per_device_eval_batch_size,
                training_args.device,
            )
            for data in evaluation_sets
        }

    initial = {name: t.float() for name, t in projector_state(session.model).items()}
    state.check(initial, initial, who="the state to start from")
    loop = Loop(
        clients=clients,
        fit=lambda client, sent, round, work_dir: driver.fit(
            client, sent, round, work_dir=work_dir, log=logger.of_client(client.name)
        ),
        method=functools.partial(methods.get(fed_args.fed_method), **options),
        output_dir=Path(training_args.output_dir),
        settings=_settings(specs, datasets, arguments, options, initial),
        rounds=fed_args.fed_rounds,
        seed=training_args.seed,
        clients_per_round=fed_args.fed_clients_per_round,
        evaluate=measure if evaluation_sets else None,
        evaluate_every=fed_args.fed_eval_every,
        log=logger.of_round,
        main=training_args.process_index == 0,
        barrier=_barrier,
    )
    logger.start()
    final = loop.run(initial)
    if training_args.process_index == 0:
        _save(final, session, Path(training_args.output_dir))
    logger.close()


def _check(model_args: ModelArguments, data_args: DataArguments, fed_args: FedArguments) -> dict:
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


def _arguments_of(
    spec: ClientSpec, argv: list[str], data_args: DataArguments, training_args: TrainingArguments
) -> tuple[DataArguments, TrainingArguments]:
    """The client's own arguments: the command line's, then what clients.yaml overrides."""
    if not spec.overrides:
        with _of(spec):
            _check_steps(training_args)
        return copy.copy(data_args), training_args
    own = [text for key, value in spec.overrides.items() for text in (f"--{key}", value)]
    with _of(spec):
        _, own_data_args, own_training_args, _ = parse(
            [*argv, *own], ModelArguments, DataArguments, TrainingArguments, FedArguments
        )
        _check_steps(own_training_args)
    # What is set on the arguments while the session is loaded.
    own_training_args.tune_mm_mlp_adapter = True
    return own_data_args, own_training_args


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


def _dataset(
    spec: ClientSpec, data_args: DataArguments, own: DataArguments, session: Session
) -> LazySupervisedDataset:
    own = _of_session(own, data_args)
    own.image_folder = spec.image_folder or data_args.image_folder
    with _of(spec):
        return LazySupervisedDataset(spec.data_path, session.tokenizer, own)


@contextlib.contextmanager
def _of(spec: ClientSpec):
    """An `InputError` inside says whose input it is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"client {spec.name}: {error}") from None


def _of_session(own: DataArguments, data_args: DataArguments) -> DataArguments:
    """`own` with what loading the session filled into `data_args`."""
    merged = copy.copy(own)
    filled = {f.name for f in dataclasses.fields(DataArguments)} - {"is_multimodal"}
    for name, value in vars(data_args).items():
        if name not in filled:
            setattr(merged, name, value)
    return merged


def _evaluation_set(
    path: str, data_args, fed_args: FedArguments, session: Session, training_args
) -> EvaluationSet:
    args = _of_session(data_args, data_args)
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


def _pool(
    datasets: Sequence[LazySupervisedDataset], data_args: DataArguments, session: Session
) -> LazySupervisedDataset:
    """All clients' samples in one data set, under the command line's own arguments."""
    records = []
    for dataset in datasets:
        for i, record in enumerate(dataset.records):
            picture = dataset.picture(i)
            records.append({**record, "image": os.path.abspath(picture)} if picture else record)
    args = copy.copy(data_args)
    return LazySupervisedDataset(records, session.tokenizer, args, session.feature_cache)


def _clients(specs, client_args, datasets, fed_args: FedArguments) -> list[Client]:
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


def _settings(specs, datasets, arguments, options: dict, initial: state.State) -> dict:
    """What decides the result, for the check that a continued run is the same run."""
    settings = {
        f"--{field.name}": str(getattr(args, field.name))
        for args in arguments
        for field in dataclasses.fields(args)
        if not _FREE.fullmatch(field.name)
    }
    settings["--fed_options"] = {k: str(v) for k, v in options.items()}
    settings["the state to start from"] = state.fingerprint(initial)
    settings["the clients"] = [
        {
            "name": spec.name,
            "samples": len(dataset),
            "data": hashlib.sha256(Path(spec.data_path).read_bytes()).hexdigest()[:16],
            "overrides": spec.overrides,
        }
        for spec, dataset in zip(specs, datasets, strict=True)
    ]
    settings["processes"] = arguments[2].world_size
    return settings


def _save(final: RoundState, session: Session, output_dir: Path) -> None:
    """Projector-only checkpoints: one for all, or one a client if the method keeps them apart."""
    session.model.config.use_cache = True
    places = {output_dir: final.shared}
    if final.personal:
        places = {output_dir / "clients" / name: s for name, s in final.personal.items()}
    for folder, projector in places.items():
        state.save(projector, folder / PROJECTOR_FILE)
        write_config(session.model.config, folder, full=False)
        print(f"wrote {folder / PROJECTOR_FILE}", flush=True)


def _barrier() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


class _Logger:
    """TensorBoard, wandb or whatever `--report_to` names, through transformers' own callbacks."""

    def __init__(self, args: TrainingArguments, kinds: list[type]):
        self.args = args
        self.state = TrainerState(is_world_process_zero=args.process_index == 0)
        callbacks = [DefaultFlowCallback(), *(kind() for kind in kinds)]
        self.handler = CallbackHandler(callbacks, None, None, None, None)

    def _log(self, step: int, values: dict[str, float]) -> None:
        self.state.global_step = step
        self.handler.on_log(self.args, self.state, TrainerControl(), logs=values)

    def start(self) -> None:
        self.handler.on_train_begin(self.args, self.state, TrainerControl())

    def of_client(self, name: str) -> Callable[[int, dict[str, float]], None]:
        """A client's logs, over its own steps."""
        return lambda step, values: self._log(
            step, {f"clients/{name}/{key}": value for key, value in values.items()}
        )

    def of_round(self, values: dict[str, float], round: int) -> None:
        self._log(round, values)

    def close(self) -> None:
        self.handler.on_train_end(self.args, self.state, TrainerControl())


def main() -> None:
    with one_clear_error():
        transformers.logging.set_verbosity_error()
        train()


if __name__ == "__main__":
    main()
