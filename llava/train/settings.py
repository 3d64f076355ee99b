"""The settings that decide the result of a run: with others it would be another run."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llava.errors import InputError
from llava.folder_lock import LOCK_FILE
from llava.model.multimodal_projector.connector import connector_flags

# Named one by one: what a later transformers adds, and what a machine may do in its own way
# (attention, checkpointed activations, loading, logging, saving), does not part a run from itself.
# All flags of connectors decide besides.
DECIDING = frozenset(
    # the model, and what of it trains
    "model_name_or_path version freeze_backbone tune_mm_mlp_adapter vision_tower "
    "mm_vision_select_layer mm_vision_select_feature mm_projector_type mm_use_im_start_end "
    "mm_use_im_patch_token mm_patch_merge_type unfreeze_mm_vision_tower freeze_mm_mlp_adapter "
    "lora_enable lora_r lora_alpha lora_dropout lora_bias bits double_quant quant_type "
    # what it sees, and in which order
    "image_folder image_aspect_ratio image_grid_pinpoints skip_bad_images model_max_length "
    "seed data_seed group_by_modality_length group_by_length train_sampling_strategy "
    "length_column_name dataloader_drop_last ignore_data_skip "
    # how it steps
    "num_train_epochs max_steps per_device_train_batch_size auto_find_batch_size "
    "gradient_accumulation_steps average_tokens_across_devices learning_rate mm_projector_lr "
    "mm_vision_tower_lr lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio "
    "schedule_samples schedule_round optim optim_args optim_target_modules weight_decay adam_beta1 "
    "adam_beta2 adam_epsilon max_grad_norm label_smoothing_factor neftune_noise_alpha "
    # in which numbers, and how they lie on several devices
    "bf16 fp16 tf32 full_determinism use_liger_kernel liger_kernel_config fsdp fsdp_config "
    "parallelism_config "
    # which of its checkpoints is the result
    "load_best_model_at_end".split()
)
# Files and folders that are known by what is in them, wherever they lie.
CONTENT = ("data_path", "pretrain_mm_mlp_adapter", "lora_weight_path", "deepspeed")
# Decide only under --load_best_model_at_end.
BEST = frozenset(
    "metric_for_best_model greater_is_better eval_strategy eval_steps save_strategy "
    "save_steps".split()
)
_ORDER = ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler")


def deciding_flags(arguments: Iterable, names: Iterable[str] = DECIDING) -> dict[str, str]:
    """`--flag` → value as text, for the fields of these dataclasses that are among `names`."""
    names = frozenset(names)
    return {
        f"--{field.name}": _text(getattr(args, field.name))
        for args in arguments
        for field in dataclasses.fields(args)
        if field.name in names
    }


def training_settings(
    model_args: Any, data_args: Any, training_args: Any, *others: Any
) -> dict[str, Any]:
    """The settings that (Model, Data, Training)Arguments stand for, JSON types only.

    Of `others`, dataclasses of flags, their `DECIDING` decide.
    """
    arguments = (model_args, data_args, training_args, *others)
    best = training_args.load_best_model_at_end
    connectors = {field.name for kind in connector_flags() for field in dataclasses.fields(kind)}
    names = DECIDING | connectors | (BEST if best else frozenset())
    names = names.union(*(other.DECIDING for other in others))
    settings: dict[str, Any] = deciding_flags(arguments, names)
    for name in (*CONTENT, "eval_data_path") if best else CONTENT:
        value = next(getattr(args, name) for args in arguments if hasattr(args, name))
        settings[f"the content of --{name}"] = fingerprint(value)
    for name in _ORDER:
        value = getattr(training_args.accelerator_config, name, None)
        settings[f"--accelerator_config {name}"] = str(value)
    settings["processes"] = training_args.world_size
    return settings


def fingerprint(path: Any) -> str | None:
    """16 hex digits of SHA-256 over a file, or over a folder's files and their names.

    None for no path; text for what is no path on this machine, such as a name on a hub.
    """
    if not path:
        return None
    if not isinstance(path, (str, os.PathLike)) or not os.path.exists(path):
        return str(path)
    digest, path = hashlib.sha256(), Path(path)
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.is_file() and p.name != LOCK_FILE)
    for file in files:
        if len(files) > 1:
            digest.update(file.name.encode() + b"\0")
        with open(file, "rb") as opened:
            while chunk := opened.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def difference(found: Mapping, now: Mapping) -> tuple[str, Any, Any] | None:
    """The first thing in which two settings differ, with both values; None if they are one run's.

    A setting that just one side knows is of another version of this program, and no difference.
    """
    found, now = (json.loads(json.dumps(dict(settings))) for settings in (found, now))
    for key in sorted(found.keys() & now.keys()):
        if found[key] != now[key]:
            return _innermost(key, found[key], now[key])
    return None


def check_same(found: Mapping, now: Mapping, where: str, otherwise: str = "") -> None:
    """Refuse, by flag and both values, to go on in `where` under other settings.

    `otherwise` ends the message: what else may be done about it.
    """
    if differs := difference(found, now):
        what, old, new = differs
        raise InputError(
            f"{where} holds a run with {what} = {old!r}, now it is {new!r}; continue with the same "
            f"command, or choose another --output_dir{otherwise}"
        )


def _innermost(what: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """Follow a difference into dicts, and into lists of clients, down to the value that differs."""
    lists = isinstance(old, list) and isinstance(new, list)
    if lists and all(isinstance(part, dict) for part in [*old, *new]):
        names = [[part["name"] for part in parts] for parts in (old, new)]
        if names[0] != names[1]:
            return f"the names of {what}", names[0], names[1]
        differ = (i for i, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1])
        i = next(differ)
        return _innermost(f"client {names[0][i]}", old[i], new[i])
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                inside = what if key == "overrides" else f"{key} of {what}"
                return _innermost(inside, old.get(key), new.get(key))
    return what, old, new


def _text(value: Any) -> str:
    return str(value.value if isinstance(value, enum.Enum) else value)
