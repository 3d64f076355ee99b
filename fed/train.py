"""Federated training: `python -m fed.train` with all flags of `llava/train/train.py` and `--fed_*`.

Leaves `mm_projector.bin` and `config.json` (a projector-only LLaVA checkpoint; with --lora_enable
the files of a LoRA one), `rounds.jsonl` (one JSON object a round) and `fed/` (what resuming needs)
in --output_dir. A method that gives each client a state of its own leaves `clients/NAME/`
checkpoints instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Any, cast

import torch
import transformers

from fed import methods, validation
from fed.arguments import CLIENT_FLAGS, Arguments, FedArguments
from fed.clients.clients_yaml import load_clients
from fed.drivers.driver import Driver, Run
from fed.drivers.private_clients import guarantees
from fed.drivers.worker_group import WorkerGroup
from fed.server.heldout import Measure, evaluation_set, measurer
from fed.server.loop import RoundLoop, Secure
from fed.server.resume_key import settings_of
from fed.server.round_state import RoundState
from fed.server.tracking import RunLogger
from llava.errors import InputError, one_clear_error
from llava.folder_lock import sole_run
from llava.progress import progress_shown
from llava.train import private_run, private_statement
from llava.train.distributed import start_process_group
from llava.train.private_accounting import Guarantee
from llava.train.train import prepare_output


@progress_shown()
def train(argv: Sequence[str] | None = None) -> None:
    """One federated run, from flags to checkpoint. Bad input is found before anything trains."""
    argv = list(sys.argv[1:] if argv is None else argv)
    kind = validation.driver_of(argv)
    argv = kind.command_line(argv)
    group = kind.join(argv)
    with group.at_work():
        _train(argv, kind, group)


def _train(argv: list[str], kind: type[Driver], group: WorkerGroup) -> None:
    start_process_group(argv)
    arguments, options = validation.check_flags(validation.parse_arguments(argv))
    fed_args = arguments.fed
    method = methods.get(fed_args.fed_method)
    rounds = method.exchanges(fed_args.fed_rounds)
    assert fed_args.fed_clients is not None  # `check_flags` refuses to go on without
    specs = load_clients(fed_args.fed_clients, CLIENT_FLAGS, kind, validation.driver_keys())
    if method.prepare is not None:
        arguments = method.prepare(specs, arguments)
    validation.check_round(specs, fed_args, options, rounds)
    client_args = [validation.arguments_of(spec, argv, arguments) for spec in specs]
    reporters = prepare_output(arguments.training)
    logger = RunLogger(arguments.training, reporters if group.main else [])

    run = Run(specs, arguments, client_args, method, options, logger.of_client, group)
    with (
        sole_run(run.output_dir, main=run.main and group.main),
        contextlib.closing(kind(run)) as driver,
    ):
        _run(run, driver, logger)


def _run(run: Run, driver: Driver, logger: RunLogger) -> None:
    """The rounds of a run whose clients are there."""
    arguments, method, options, rounds = run.arguments, run.method, run.options, run.rounds
    fed_args, group = arguments.fed, run.group
    validation.check_samples(fed_args, [len(data) for data in driver.datasets], rounds)
    counts = [sum(c.samples(r) > 0 for c in driver.clients) for r in range(1, rounds + 1)]
    validation.rehearse(fed_args, options, counts)  # once more: a slice may be empty
    loop = RoundLoop(
        driver,
        method,
        options,
        output_dir=run.output_dir,
        settings=settings_of(run, driver),
        rounds=rounds,
        seed=arguments.training.seed,
        clients_per_round=fed_args.fed_clients_per_round,
        min_clients=fed_args.fed_min_clients,
        explains=run.explains,
        secure=_secure(fed_args),
        task_of={spec.name: spec.task for spec in run.specs if spec.task is not None},
        evaluate=_measurer(driver, arguments) if group.main else None,
        evaluate_every=fed_args.fed_eval_every,
        log=logger.of_round,
        main=run.main and group.main,
        follows=not group.main,
        barrier=_barrier if group.alone else group.barrier,
    )
    logger.start()
    if fed_args.private and run.main and group.main:
        private_statement.write(run.output_dir, _guarantees(run, driver))
    try:
        final = loop.run(driver.initial)
    except InputError:
        # What a store brings together from all ranks is left to a run of one process.
        alone = arguments.training.world_size == 1 or method.store is None
        if loop.state is not None and loop.state.round and alone:
            if run.main and group.main:
                print(f"the model after round {loop.state.round} is left:", flush=True)
            try:
                _export(run, driver, loop, loop.state, over=False)
            except Exception as failed:  # what the run stopped for is what there is to say
                print(f"warning: it could not be written: {failed}", flush=True)
        raise
    _export(run, driver, loop, final)
    logger.close()


def _export(
    run: Run, driver: Driver, loop: RoundLoop, state: RoundState, over: bool = True
) -> None:
    """Write the checkpoints of a round.

    Unless the run is `over`, sites are told nothing of it, and what continuing needs stays.
    """
    store = driver.store
    store.config.use_cache = True
    if not run.group.main:
        return
    export = store.export if over or driver.data_here else store.export_shared
    export(state, functools.partial(loop.sent, state), run.output_dir)
    if run.arguments.fed.private:
        title = f"{len(run.specs)} clients by {run.method.name}"
        own = [run.output_dir / "clients" / name for name in state.personal]
        leave = private_run.finish if over else private_run.write_cards
        leave(run.output_dir, _guarantees(run, driver), title, own)


def _secure(fed_args: FedArguments) -> Secure | None:
    if not fed_args.fed_secure:
        return None
    return Secure(fed_args.fed_secure_min, fed_args.fed_secure_norm)


def _guarantees(run: Run, driver: Driver) -> dict[str, Guarantee]:
    """What the records of the clients that are known are promised."""
    return guarantees(run, cast(Any, driver.clients), driver.datasets)


def _measurer(driver: Driver, arguments: Arguments) -> Measure | None:
    """The measurer on the files of --fed_eval_data_path, where there are some."""
    if not arguments.fed.fed_eval_data_path:
        return None
    assert driver.session is not None  # a driver loads a model where something is measured
    fed_args = arguments.fed
    folder = fed_args.fed_eval_image_folder or arguments.data.image_folder
    sets = [
        evaluation_set(
            path,
            driver.session,
            dataclasses.replace(arguments.data, image_folder=folder),
            fed_args.fed_eval_domain,
            world_size=arguments.training.world_size,
        )
        for path in fed_args.fed_eval_data_path
    ]
    return measurer(driver, driver.session, sets, arguments.training, fed_args.fed_eval_explained)


def _barrier() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def main() -> None:
    with one_clear_error():
        transformers.logging.set_verbosity_error()
        train()


if __name__ == "__main__":
    main()
