"""Calibration data of a merge: records on one frozen LLaVA, into which projectors are put in turn.

The model is loaded once for all files, and the tower's features of each picture are computed once.
Tiled pictures (image_aspect_ratio anyres) are the exception, as in training: no cache holds their
features, so they go through the tower at every call.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fed.merging.config import MergeConfig
from fed.merging.model_calibration import ModelCalibration
from fed.merging.sources import WHOLE, Source
from fed.methods import Calibration
from fed.state import save
from llava.errors import InputError
from llava.model.checkpoint import projector_parameters
from llava.model.checkpoint_names import PROJECTOR_FILE
from llava.model.lora import base_of
from llava.model.picture_tokens import separate_rows, uses_start_end
from llava.train.arguments import DataArguments
from llava.train.data import DataCollatorForSupervisedDataset, LazySupervisedDataset
from llava.train.finished import finished_session
from llava.train.session import make_feature_cache


def calibration_of(config: MergeConfig, experts: Sequence[Source]) -> Sequence[Calibration] | None:
    """The calibration of `--calibration_data`, one for each expert; None without.

    The model is the first expert if that is a full one; else its projector on `--model_base`, or on
    the base that a LoRA folder names.

    Raises:
        InputError: no such model, or data that cannot be read.
    """
    if not config.calibration_data:
        return None

    def load(model: Path | str, model_base: str | None) -> Sequence[Calibration]:
        loaded = load_calibration(
            str(model),
            model_base,
            config.calibration_data,
            config.image_folder,
            version=config.version,
            samples=config.calibration_samples,
            device=config.device,
        )
        return loaded * (len(experts) if len(loaded) == 1 else 1)

    first = experts[0]
    if first.kind in WHOLE:
        return load(first.path, None)
    model_base = config.model_base
    if first.kind == "lora":
        model_base = model_base or base_of(first.path)
    if not model_base:
        raise InputError("--calibration_data: name the language model with --model_base")
    file = Path(config.config) if config.config else first.folder / "config.json"
    if not file.is_file():
        raise InputError(
            f"--calibration_data: {first.label} has no config.json; name one by --config"
        )
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(file, Path(folder) / "config.json")
        save(first.projector, Path(folder) / PROJECTOR_FILE)
        return load(folder, model_base)


def load_calibration(
    model: str,
    model_base: str | None,
    data: Sequence[str],
    image_folder: str | None,
    *,
    version: str = "plain",
    samples: int = 256,
    batch_size: int = 16,
    device: str = "cpu",
    seed: int = 0,
) -> list[ModelCalibration]:
    """One calibration a data file, all on one model.

    Args:
        model, model_base: as `load_pretrained_model` takes them. Projectors are put into this
            model, in float32, so its own is of no matter.
        data: files of LLaVA records.
        version: the conversation template that the projectors were aligned with.
        samples: at most so many records of a file, one drawn from each of as many equal stretches.

    Raises:
        InputError: a model without pictures, a file or picture that is missing or broken, a file
            that holds no records, or none with an answer to measure.
    """
    if samples < 1 or batch_size < 1:
        raise InputError(f"calibration: {samples} samples in batches of {batch_size}, expected 1+")
    if not data:
        raise InputError("calibration: no data file is given")
    session = finished_session(model, model_base, version, device)
    llava: Any = session.model  # its class is made by `llava_class`
    tokenizer = session.tokenizer
    llava.get_model().mm_projector.float()  # small differences of projectors must not be lost
    if uses_start_end(llava.config):
        separate_rows(llava, tokenizer)
    for parameter in projector_parameters(llava).values():
        parameter.requires_grad_(True)
    sample_format = session.sample_format
    tiled = sample_format.tiling is not None
    cache = None if tiled else make_feature_cache(llava.get_vision_tower(), sample_format)
    collate = DataCollatorForSupervisedDataset(tokenizer)
    found = []
    for path in data:
        dataset = LazySupervisedDataset(
            path, tokenizer, DataArguments(image_folder=image_folder), cache, sample_format
        )
        dataset = dataset.select(spread(len(dataset), samples, seed))
        if cache is not None:
            cache.prefetch(dataset.pictures())
        dataset.check()
        found.append(ModelCalibration(llava, dataset, collate, batch_size, path))
    return found


def spread(records: int, samples: int, seed: int) -> list[int]:
    """Indices in order, one drawn from each of `samples` equal stretches; all of fewer."""
    if records <= samples:
        return list(range(records))
    ends = [records * i // samples for i in range(samples + 1)]
    draw = random.Random(seed)
    return [draw.randrange(low, high) for low, high in zip(ends[:-1], ends[1:], strict=True)]
