"""A private run: how often it sees a record, what it states, and what it leaves beside a checkpoint.

`OUTPUT/privacy.json` holds the guarantee with all that it follows from, written before anything trains;
`OUTPUT/README.md`, the model card, says the same with its assumptions.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava.atomic import write_text
from llava.errors import InputError
from llava.json_files import read_json
from llava.train.arguments import TrainingArguments
from llava.train.data import LazySupervisedDataset
from llava.train.llava_trainer import steps_of
from llava.train.private_accounting import Guarantee, guarantee
from llava.train.private_arguments import PrivacyArguments, samples_of_step
from llava.train.private_noise import FOLDER, NoiseSecret
from llava.train.private_trainer import PrivateSteps

logger = logging.getLogger(__name__)

FILE = "privacy.json"
CARD = "README.md"

ASSUMPTIONS = (
    "A record is one entry of a data file: a conversation with at most one picture. Of somebody who "
    "stands in several entries, each by itself is protected; all of them together are less.",
    "Neighbouring data sets differ in one record, which in one of them gives nothing (zero-out "
    "adjacency); `replaced` is epsilon where another record stands in its place.",
    "Batches are fixed: their sizes, and which places of the list share a step, follow from the seed "
    "and the number of records alone. That number is public. No amplification by sampling is claimed.",
    "Each sample's gradient, of the mean loss over its own labelled tokens, is clipped to a length of "
    "`clip` over all tensors that train; each step's sum gets Gaussian noise of `noise` times `clip` "
    "once, and is divided by a fixed number.",
    "The noise is drawn from a secret of 256 bits by AES-256 and holds against who cannot break that; "
    "sums are floating-point numbers, taken for real ones.",
    "Covered is what follows from the noised steps: the weights that were trained, and what is sent of "
    "them. Not covered: losses in logs and in trainer_state.json, how long training takes, "
    "that records which cannot be read were left out, earlier runs on the same records, and what was "
    "learnt of them before (base model, tower, a projector to start from).",
)


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


def finish(output: Path, stated: Mapping[str, Guarantee], title: str) -> None:
    """Write the model card, and remove the secret: nobody can take the noise off any more."""
    write_text(output / CARD, card(title, stated))
    write(output, stated, finished=True)
    shutil.rmtree(output / FOLDER, ignore_errors=True)


def finished(output: Path) -> bool:
    """Whether `output` holds a private run that has come to its end."""
    file = output / FILE
    return file.is_file() and bool(read_json(file).get("finished"))


def write(output: Path, stated: Mapping[str, Guarantee], finished: bool = False) -> None:
    """`privacy.json`, by client."""
    values = {
        "finished": finished,
        "guarantees": {name: of.as_json() for name, of in stated.items()},
        "assumptions": list(ASSUMPTIONS),
    }
    write_text(output / FILE, json.dumps(values, indent=1) + "\n")


def sentence(who: str, stated: Guarantee) -> str:
    """The guarantee on one line."""
    often = "one step" if stated.entries == 1 else f"{stated.entries} steps"
    return (
        f"{who} is private: epsilon {rounded_up(stated.epsilon)} at delta {stated.delta:g} for a "
        f"record of {stated.records}, which enters {often} (noise {stated.noise:.4g}, clip "
        f"{stated.clip:g}, no amplification by sampling; epsilon {rounded_up(stated.replaced)} if it "
        "is replaced)"
    )


def section(stated: Mapping[str, Guarantee | Mapping[str, Any]]) -> str:
    """The guarantees as a table, and their assumptions, in Markdown."""
    lines = [
        "| | epsilon | delta | replaced | records | steps a record | noise | clip | samples a step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, of in stated.items():
        values = of.as_json() if isinstance(of, Guarantee) else of
        lines.append(
            f"| {name} | {rounded_up(values['epsilon'])} | {values['delta']:g} "
            f"| {rounded_up(values['replaced'])} | {values['records']} | {values['entries']} "
            f"| {values['noise']:.4g} | {values['clip']:g} | {values['step']} |"
        )
    return "\n".join([*lines, "", *(f"- {text}" for text in ASSUMPTIONS)])


def card(title: str, stated: Mapping[str, Guarantee]) -> str:
    """The model card."""
    return (
        "---\nlibrary_name: llava\npipeline_tag: image-text-to-text\n"
        f"tags: [llava, differential-privacy]\n---\n\n# {title}\n\n"
        "## Differential privacy of a record\n\n"
        f"{section(stated)}\n"
    )


def rounded_up(epsilon: float | None) -> str:
    """To three places, never less than it is; None is one above 500."""
    return "above 500" if epsilon is None else f"{math.ceil(epsilon * 1000 - 1e-6) / 1000:g}"
