"""Held-out files: read and checked, and what measures a state on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn

from fed.clients.measures import EvaluationSet, evaluate
from fed.drivers.driver import Driver
from fed.state import State
from llava.errors import InputError
from llava.model.checkpoint import gathered
from llava.train.arguments import DataArguments, TrainingArguments
from llava.train.data import DataCollatorForSupervisedDataset, LazySupervisedDataset
from llava.train.session import Session
from llava.train.train import prepare

# (client, state, extras, round) -> measures by data set.
Measure: TypeAlias = Callable[[str, State, State, int], dict]


def evaluation_set(
    path: str,
    session: Session,
    data_args: DataArguments,
    domain: str,
    *,
    flag: str = "--fed_eval_data_path",
    world_size: int = 1,
) -> EvaluationSet:
    """A held-out file, checked whole, with its samples' domains.

    Args:
        domain: the key of a record that names its domain; where one lacks it there are none.
        flag: what named the file, for messages.

    Raises:
        InputError: what `LazySupervisedDataset` refuses, or a caption that would be cut.
    """
    dataset = LazySupervisedDataset(
        path, session.tokenizer, data_args, sample_format=session.sample_format
    )
    report = prepare(dataset, f"held out, {path}", session.feature_cache, world_size)
    if report.truncated:
        raise InputError(
            f"{flag} {path}: {report.truncated} captions are longer than model_max_length "
            f"{session.tokenizer.model_max_length}; cut ones cannot be measured"
        )
    keys = [record.get(domain) for record in dataset.records]
    return EvaluationSet(
        Path(path).stem, dataset, None if None in keys else [str(key) for key in keys]
    )


def measurer(
    driver: Driver,
    session: Session,
    sets: Sequence[EvaluationSet],
    args: TrainingArguments,
    explained: bool = False,
) -> Measure:
    """A function that measures a client's state: (client, state, extras, round) -> measures.

    The state is that after the round. Where clients train elsewhere, the model is on the device
    only for that. `explained` is passed to `evaluate`.
    """
    model: nn.Module = session.model
    visit = not driver.trains_here
    collator = DataCollatorForSupervisedDataset(session.tokenizer)

    def measure(client: str, state: State, extras: State, round: int) -> dict:
        driver.store.visit(client, extras, round)
        driver.part.into_model(model, state, "the aggregated state")
        model.eval()
        if visit:
            model.to(args.device)
        with gathered(model.parameters()):  # between two clients no engine does it
            measures = {
                data.name: evaluate(
                    model, data, collator, args.per_device_eval_batch_size, args.device, explained
                )
                for data in sets
            }
        if visit and args.device.type == "cuda":
            model.to("cpu")
            torch.cuda.empty_cache()
        return measures

    return measure
