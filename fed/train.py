"""Federated training: `python -m fed.train` with all flags of `llava/train/train.py` and `--fed_*`.

Leaves `mm_projector.bin` and `config.json` (a projector-only LLaVA checkpoint), `rounds.jsonl` (one
JSON object a round) and `fed/` (what resuming needs) in --output_dir. A method that gives each
client a state of its own leaves `clients/NAME/` checkpoints instead.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from fed import methods, state
from fed.arguments import CLIENT_FLAGS, FedArguments
from fed.clients import ClientSpec, load_clients
from fed.drivers.resident import ResidentDriver
from fed.evaluate import evaluate
from fed.inputs import (
    arguments_of,
    check_flags,
    evaluation_set,
    load_clients_data,
    make_clients,
    pool,
)
from fed.logger import RunLogger
from fed.round_state import RoundState
from fed.rounds import Loop
from fed.settings import settings_of
from llava.errors import InputError, one_clear_error
from llava.model.checkpoint import PROJECTOR_FILE, load_projector, projector_state, write_config
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments, parse
from llava.train.data import DataCollatorForSupervisedDataset
from llava.train.train import Session, load_session, prepare_output


def train(argv: Sequence[str] | None = None) -> None:
    """One federated run, from flags to checkpoint. Bad input is found before anything trains."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = parse(argv, ModelArguments, DataArguments, TrainingArguments, FedArguments)
    model_args, data_args, training_args, fed_args = arguments
    options = check_flags(model_args, data_args, fed_args)
    specs = load_clients(fed_args.fed_clients, CLIENT_FLAGS)
    if fed_args.fed_clients_per_round > len(specs):
        raise InputError(
            f"--fed_clients_per_round is {fed_args.fed_clients_per_round}, "
            f"{fed_args.fed_clients} has {len(specs)} clients"
        )
    client_args = [arguments_of(spec, argv, data_args, training_args) for spec in specs]
    logger = RunLogger(training_args, prepare_output(training_args))

    session = load_session(model_args, data_args, training_args)
    datasets = load_clients_data(specs, data_args, client_args, session)
    evaluation_sets = [
        evaluation_set(path, data_args, fed_args, session, training_args)
        for path in fed_args.fed_eval_data_path
    ]
    if fed_args.fed_pool:
        everything = [pool(datasets, data_args, session)]
        own = [(data_args, training_args)]
        clients = make_clients([ClientSpec("pool", "")], own, everything, fed_args)
    else:
        clients = make_clients(specs, client_args, datasets, fed_args)

    collator = DataCollatorForSupervisedDataset(session.tokenizer)
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
        settings=settings_of(specs, datasets, arguments, options, initial),
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


def main() -> None:
    with one_clear_error():
        transformers.logging.set_verbosity_error()
        train()


if __name__ == "__main__":
    main()
