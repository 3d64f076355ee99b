"""The beginning and the end of a private run, and how often it sees a record."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llava.atomic import write_text
from llava.errors import InputError
from llava.train.arguments import TrainingArguments
from llava.train.data import LazySupervisedDataset
from llava.train.llava_trainer import steps_of
from llava.train.private_accounting import Guarantee, guarantee
from llava.train.private_arguments import PrivacyArguments, samples_of_step
from llava.train.private_noise import FOLDER, NoiseSecret
from llava.train.private_statement import CARD, card, sentence, write
from llava.train.private_trainer import PrivateSteps

logger = logging.getLogger(__name__)


def passes(args: TrainingArguments, samples: int) -> int:
    """How often training on `samples` samples sees each of them at most."""
    if not samples:
        return 0
    if args.max_steps <= 0:
        return math.ceil(args.num_train_epochs)
    batches = math.ceil(samples / args.train_batch_size)
    if args.dataloader_drop_last:
        batches = max(samples // args.train_batch_size, 1)
    per_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    return math.ceil(steps_of(args, samples) / per_epoch)


def check_records(dataset: LazySupervisedDataset) -> None:
    """Refuse a sample with several pictures, by its name."""
    for index in range(len(dataset)):
        if (count := len(dataset.paths(index))) > 1:
            raise InputError(
                f"{dataset.name(index)} has {count} pictures; private training takes one a sample"
            )


def begin(
    privacy: PrivacyArguments,
    args: TrainingArguments,
    dataset: LazySupervisedDataset,
    settings: Mapping[str, Any],
) -> tuple[Guarantee, PrivateSteps]:
    """The guarantee of a run on one data set, stated and written, and how its steps are made.

    Raises:
        InputError: a sample with several pictures, delta above 1 / records, or --output_dir holds a
            run of other settings that has begun.
    """
    check_records(dataset)
    output = Path(args.output_dir)
    stated = guarantee(
        privacy,
        entries=passes(args, len(dataset)),
        records=len(dataset),
        step=samples_of_step(args),
        who="--data_path",
    )
    secret = NoiseSecret(output / FOLDER / "run.json")
    text = json.dumps(dict(settings), sort_keys=True)
    secret.begin("the run", hashlib.sha256(text.encode()).hexdigest())
    logger.info("%s", sentence("this run", stated))
    write(output, {"run": stated})
    return stated, PrivateSteps(stated.clip, stated.noise, secret, "the run")


def write_cards(
    output: Path, stated: Mapping[str, Guarantee], title: str, others: Iterable[Path] = ()
) -> None:
    """Write the model card. `others` are the folders of further checkpoints of the run."""
    for folder in (output, *others):
        write_text(folder / CARD, card(title, stated))


def finish(
    output: Path, stated: Mapping[str, Guarantee], title: str, others: Iterable[Path] = ()
) -> None:
    """Write the model cards, and remove the secret: nobody can take the noise off any more."""
    write_cards(output, stated, title, others)
    write(output, stated, finished=True)
    shutil.rmtree(output / FOLDER, ignore_errors=True)
