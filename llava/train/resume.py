"""The checkpoint from which a run in --output_dir goes on, and the check that it is the same run.

`run.json` lies beside the checkpoints and holds what decides their result. It is written before
anything trains. A folder with checkpoints and without it is of upstream's code, or of a version of
this one that wrote none: what can be seen in a checkpoint itself is compared then.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerCallback

from llava.atomic import remove_leftovers, write_text
from llava.errors import InputError
from llava.model.checkpoint_names import PROJECTOR_FILE
from llava.model.lora import ADAPTER_CONFIG
from llava.train.arguments import TrainingArguments
from llava.train.llava_trainer import last_checkpoint
from llava.train.settings import check_same

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
# How far a run goes and how a step is dealt out: a checkpoint that is named goes on under others.
# All else is in the optimizer's state, or would be another run's result.
LENGTH = frozenset(
    "--num_train_epochs --max_steps --per_device_train_batch_size --gradient_accumulation_steps "
    "processes".split()
)


def starting_point(args: TrainingArguments, settings: Mapping[str, Any]) -> str | None:
    """The checkpoint that the run goes on from, None if it begins anew.

    That is the newest whole one in --output_dir, which must be of the same settings; or the one
    that --resume_from_checkpoint names (True: the newest), for which `LENGTH` may differ.

    Raises:
        InputError: the folder holds another run, or the named checkpoint is not one.
    """
    newest = last_checkpoint(args.output_dir)
    named = _named(args, newest)
    checkpoint = named or newest
    steady = {key: value for key, value in settings.items() if key not in LENGTH}
    folders = [Path(checkpoint).absolute().parent] if checkpoint else []
    if newest or Path(args.output_dir, "trainer_state.json").is_file():  # begun, or finished
        folders.append(Path(args.output_dir))
    for folder in folders:
        found, where = recorded(folder), f"--output_dir {folder}"
        check_same(found, steady, where)
        if not named:
            longer = f"; or go on under this one with --resume_from_checkpoint {newest}"
            check_same(found, settings, where, longer if newest else "")
    if checkpoint:
        _check_kind(Path(checkpoint), settings)
        if args.process_index == 0 and not recorded(folders[0]):
            logger.info(
                "%s: which flags it was trained with is not recorded there; "
                "going on with those of this command",
                checkpoint,
            )
    return checkpoint


def recorded(folder: Path) -> dict[str, Any]:
    """The settings of the run in `folder`; empty where none are recorded."""
    file = folder / RUN_FILE
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["settings"]
        return dict(found)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: not the settings of a run ({error})") from None


def record(args: TrainingArguments, settings: Mapping[str, Any]) -> None:
    """Write the settings of the run that now begins to train."""
    if args.process_index == 0:
        remove_leftovers(args.output_dir)
        text = json.dumps({"settings": dict(settings)}, indent=2) + "\n"
        write_text(Path(args.output_dir, RUN_FILE), text)


class SayWhereItBegins(TrainerCallback):
    """Says of a continued run where it stands, and of a finished one that nothing is left."""

    def on_train_begin(self, args, state, control, **kwargs):
        step, last = state.global_step, state.max_steps
        if not (step and state.is_world_process_zero):
            return
        if step < last:
            logger.info("continuing after step %d of %d", step, last)
        else:
            logger.info("%s: already trained to step %d, nothing to do", args.output_dir, step)


def _named(args: TrainingArguments, newest: str | None) -> str | None:
    """The checkpoint of --resume_from_checkpoint; upstream's users also type True and False."""
    given = args.resume_from_checkpoint
    if given is None or given == "":
        return None
    flag, wish = f"--resume_from_checkpoint {given}", str(given).lower()
    if wish == "false":
        if newest:
            raise InputError(f"{flag}: {newest} is there; choose another --output_dir")
        return None
    if wish == "true":
        if newest is None:
            raise InputError(f"{flag}: --output_dir {args.output_dir} holds no whole checkpoint")
        return newest
    try:
        json.loads(Path(given, "trainer_state.json").read_text())
    except (OSError, ValueError):
        raise InputError(
            f"{flag}: not a whole checkpoint; a folder checkpoint-N with its trainer_state.json is "
            "expected"
        ) from None
    return os.fspath(given)


def _check_kind(checkpoint: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a checkpoint in which something else trains than the flags say."""
    names = {path.name for path in checkpoint.iterdir()}
    if ADAPTER_CONFIG in names:
        holds = "LoRA"
    else:
        holds = "the projector alone" if PROJECTOR_FILE in names else "the whole model"
    wanted = "LoRA" if settings["--lora_enable"] == "True" else "the whole model"
    if settings["--tune_mm_mlp_adapter"] == "True":
        wanted = "the projector alone"
    if holds != wanted:
        raise InputError(
            f"{checkpoint} is of a run that trains {holds}, now {wanted} would train; choose "
            "another --output_dir"
        )
