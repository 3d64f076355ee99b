"""Federated training: `python -m fed.train` with all flags of `llava/train/train.py` and `--fed_*`.

Leaves `mm_projector.bin` and `config.json` (a projector-only LLaVA checkpoint; with --lora_enable
the files of a LoRA one), `rounds.jsonl` (one JSON object a round) and `fed/` (what resuming needs)
in --output_dir. A method that gives each client a state of its own leaves `clients/NAME/`
checkpoints instead.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers

from fed import inputs, methods, setup, state
from fed.arguments import CLIENT_FLAGS, FedArguments
from fed.clients import load_clients
from fed.evaluate import EvaluationSet, evaluate
from fed.export import export
from fed.logger import RunLogger
from fed.round_state import RoundState
from fed.rounds import Loop
from fed.settings import settings_of
from llava.errors import one_clear_error
from llava.model.checkpoint import gathered, write_config
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments, parse
from llava.train.data import DataCollatorForSupervisedDataset
from llava.train.train import prepare_output


def train(argv: Sequence[str] | None = None) -> None:
    """One federated run, from flags to checkpoint. Bad input is found before anything trains."""
    argv = inputs.for_driver(list(sys.argv[1:] if argv is None else argv))
    arguments = parse(argv, ModelArguments, DataArguments, TrainingArguments, FedArguments)
    _, data_args, training_args, fed_args = arguments
    options = inputs.check_flags(*arguments)
    scripted = fed_args.fed_driver == "script"
    method = methods.get(fed_args.fed_method)
    specs = load_clients(fed_args.fed_clients, CLIENT_FLAGS, processes=scripted)
    inputs.check_pilot(specs, *arguments)
    inputs.check_round(specs, fed_args, options)
    client_args = [inputs.arguments_of(spec, argv, data_args, training_args) for spec in specs]
    logger = RunLogger(training_args, prepare_output(training_args))

    if scripted:
        run = setup.scripted(specs, arguments, logger)
    else:
        rule = methods.client_rule(fed_args.fed_method, options)
        run = setup.resident(specs, client_args, arguments, logger, rule)
    rounds = range(1, fed_args.exchanges + 1)
    at_work = [sum(client.samples(round) > 0 for client in run.clients) for round in rounds]
    inputs.rehearse(fed_args, options, at_work)  # once more: a slice may be empty
    evaluation_sets = [
        setup.evaluation_set(path, data_args, fed_args, run.session, training_args)
        for path in fed_args.fed_eval_data_path
    ]
    measure = None
    if evaluation_sets:
        measure = _measure(run, evaluation_sets, training_args, visit=scripted)
    loop = Loop(
        clients=run.clients,
        fit_many=run.fit_many,
        method=functools.partial(method, **options),
        rule=method.client,
        send=method.send,
        tasks={spec.name: spec.task for spec in specs if spec.task is not None},
        output_dir=Path(training_args.output_dir),
        settings=settings_of(specs, run.datasets, arguments, options, run.initial),
        rounds=fed_args.exchanges,
        seed=training_args.seed,
        clients_per_round=fed_args.fed_clients_per_round,
        min_clients=fed_args.fed_min_clients,
        evaluate=measure,
        evaluate_every=fed_args.fed_eval_every,
        log=logger.of_round,
        main=training_args.process_index == 0,
        barrier=_barrier,
    )
    logger.start()
    final = loop.run(run.initial)
    _save(final, run, loop, training_args)
    logger.close()


def _measure(
    run: setup.Setup, sets: Sequence[EvaluationSet], args: TrainingArguments, visit: bool
) -> Callable[..., dict]:
    """What the loop calls to measure a state; with `visit` the model is on the device only then."""
    model = run.session.model
    collator = DataCollatorForSupervisedDataset(run.session.tokenizer)

    def measure(client: str, shared: state.State, beside: state.State, round: int) -> dict:
        if run.own:
            run.own.put(client, beside, after=round)
        run.form.into_model(model, shared, "the aggregated state")
        model.eval()
        if visit:
            model.to(args.device)
        with gathered(model.parameters()):  # between two clients no engine does it
            measures = {
                data.name: evaluate(
                    model, data, collator, args.per_device_eval_batch_size, args.device
                )
                for data in sets
            }
        if visit and args.device.type == "cuda":
            model.to("cpu")
            torch.cuda.empty_cache()
        return measures

    return measure


def _save(final: RoundState, run: setup.Setup, loop: Loop, args: TrainingArguments) -> None:
    """Checkpoints of what trained: one for all, or one a client if the method keeps them apart."""
    output_dir = Path(args.output_dir)
    run.config.use_cache = True
    if run.own:
        export(final, run.session.model, run.own, loop, output_dir)
    if run.own or args.process_index:
        return
    places = {output_dir: final.shared}
    if final.personal:
        places = {output_dir / "clients" / name: s for name, s in final.personal.items()}
    for folder, trained in places.items():
        run.form.write(trained, folder)
        write_config(run.config, folder, full=False)
        print(f"wrote {folder / run.form.files[0]}", flush=True)


def _barrier() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def main() -> None:
    with one_clear_error():
        transformers.logging.set_verbosity_error()
        train()


if __name__ == "__main__":
    main()
