"""Calibration data of a merge: one frozen model, into which each projector is put in turn."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fed.merging.config import Settings
from fed.merging.sources import WHOLE, Source
from fed.methods import Calibration
from fed.state import save
from llava.errors import InputError
from llava.model.checkpoint import PROJECTOR_FILE
from llava.model.lora import ADAPTER_CONFIG
from llava.model.shards import read_json


def calibration(settings: Settings, experts: Sequence[Source]) -> Sequence[Calibration] | None:
    """What `--calibration_data` asks for, one for each expert; None without.

    The model is the first expert if that is a full one; else its projector on `--model-base`, or on
    the base that a LoRA folder names.

    Raises:
        InputError: no such model, or data that cannot be read.
    """
    if not settings.calibration_data:
        return None
    from fed.merging.calibration_data import load_calibration

    def load(model: Path | str, model_base: str | None) -> Sequence[Calibration]:
        found = load_calibration(
            str(model),
            model_base,
            settings.calibration_data,
            settings.image_folder,
            version=settings.version,
            samples=settings.calibration_samples,
            device=settings.device,
        )
        return list(found) * (len(experts) if len(found) == 1 else 1)

    first = experts[0]
    if first.kind in WHOLE:
        return load(first.path, None)
    model_base = settings.model_base
    if first.kind == "lora":
        model_base = model_base or read_json(first.path / ADAPTER_CONFIG).get(
            "base_model_name_or_path"
        )
    if not model_base:
        raise InputError("--calibration_data: name the language model with --model-base")
    config = Path(settings.config) if settings.config else first.folder / "config.json"
    if not config.is_file():
        raise InputError(
            f"--calibration_data: {first.who} has no config.json; name one by --config"
        )
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(config, Path(folder) / "config.json")
        save(first.projector, Path(folder) / PROJECTOR_FILE)
        return load(folder, model_base)
