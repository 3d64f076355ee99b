"""The Trainer: transformers' own, with LLaVA's sampler, learning rates and checkpoints.

Where a part of the model trains (the projector, or LoRA with the projector), that part is what a
checkpoint holds, with its optimizer state and never the frozen model; a run resumes from it to the
bit.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import shutil
from collections.abc import Callable
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback

from llava.atomic import sync
from llava.errors import InputError, reason
from llava.model.checkpoint import (
    load_full,
    load_projector,
    projector_state,
    save_full,
    write_config,
)
from llava.model.checkpoint_names import PROJECTOR_FILE
from llava.model.lora import is_lora, load_lora, save_lora
from llava.state import is_finite, load, save
from llava.train.sampler import LengthGroupedSampler

if TYPE_CHECKING:
    from llava.train.arguments import TrainingArguments as LLaVATrainingArguments

logger = logging.getLogger(__name__)


class LLaVATrainer(Trainer):
    """`Trainer` that also reads the arguments of `llava.train.arguments.TrainingArguments`."""

    args: LLaVATrainingArguments
    model: Any  # a PreTrainedModel, or peft's wrapper of one

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        except ImportError as error:  # a flag asks for a package that is not there
            raise InputError(reason(error)) from error

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not getattr(self.args, "group_by_modality_length", False):
            return super()._get_train_sampler(dataset)
        # A generator of its own, seeded anew each epoch: a resumed run draws the same order.
        generator = torch.Generator()
        self.add_callback(_SeedEachEpoch(generator))
        return LengthGroupedSampler(
            self.args.train_batch_size,
            world_size=self.args.world_size * self.args.gradient_accumulation_steps,
            lengths=dataset.modality_lengths,
            generator=generator,
            group_by_modality=True,
        )

    def create_optimizer(self, model=None):
        rates = {
            "mm_projector": getattr(self.args, "mm_projector_lr", None),
            "vision_tower": getattr(self.args, "mm_vision_tower_lr", None),
        }
        if self.optimizer is not None or not any(rate is not None for rate in rates.values()):
            return super().create_optimizer(model)
        model = self.model if model is None else model
        decay = set(self.get_decay_parameter_names(model))
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        groups: dict[tuple[float | None, bool], dict] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            rate = next((rate for part, rate in rates.items() if part in name), None)
            key = (rate, name in decay)
            if key not in groups:
                groups[key] = {"params": [], "weight_decay": self.args.weight_decay * key[1]}
                if rate is not None:
                    groups[key]["lr"] = rate
            groups[key]["params"].append(parameter)
        self.optimizer = optimizer_class(list(groups.values()), **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """The run's own schedule, or its part of the one that --schedule_samples spans."""
        samples = getattr(self.args, "schedule_samples", None)
        if self.lr_scheduler is None and samples:
            steps = [steps_of(self.args, n) for n in samples]
            before = sum(steps[: self.args.schedule_round - 1])
            whole: Any = super().create_scheduler(sum(steps), optimizer)
            shifted: list[Callable[[int], float]] = [
                functools.partial(_shifted, factor, before) for factor in whole.lr_lambdas
            ]
            for group in whole.optimizer.param_groups:
                group["lr"] = group.pop("initial_lr")
            self.lr_scheduler = LambdaLR(whole.optimizer, shifted)
        return super().create_scheduler(num_training_steps, optimizer)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        try:
            return Trainer.get_optimizer_cls_and_kwargs(args, model)
        except (ImportError, ValueError) as error:  # a package that is missing, --optim_args
            raise InputError(f"--optim {_value(args.optim)}: {reason(error)}") from None

    # -- checkpoints -----------------------------------------------------------------------------

    @property
    def saves_part(self) -> bool:
        """Whether a checkpoint holds the part that trains, without the frozen model around it."""
        projector_alone = getattr(self.model.config, "tune_mm_mlp_adapter", False)
        return projector_alone or is_lora(self.model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = output_dir or self.args.output_dir
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not is_finite(parameter.detach()):
                raise InputError(
                    f"{folder}: the training has diverged, {name} is not finite after step "
                    f"{self.state.global_step}; it is not saved, and older checkpoints are kept. "
                    "A lower --learning_rate or --max_grad_norm, or a longer warm-up, may help"
                )
        if not self.saves_part:
            super().save_model(folder, _internal_call)
            return
        save_part(self.model, folder, write=self.args.should_save)
        if self.args.should_save:
            write_config(self.model.config, folder, full=False)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            save_full(self.model, self.processing_class, folder, state_dict)

    def _save_checkpoint(self, model, trial) -> None:
        # transformers deletes old checkpoints before the new one is on the disk, and tells which
        # are old by the clock; so that is done here, afterwards and by step.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        except RuntimeError as error:  # torch.save's word for a full disk
            if "inline_container" not in str(error):
                raise
            free = shutil.disk_usage(self.args.output_dir).free / 1e9
            raise InputError(
                f"{self.args.output_dir}: the checkpoint of step {self.state.global_step} "
                f"cannot be written whole; {free:.1f} GB are free there"
            ) from None
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            folder = Path(self.args.output_dir)
            sync(folder / f"checkpoint-{self.state.global_step}")
            if limit is not None and limit > 0:
                remove_oldest(folder, limit, self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        (load_part if self.saves_part else load_full)(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if self.is_deepspeed_enabled and not self.saves_part:
            super()._load_best_model()
        else:
            assert best is not None, "the Trainer has looked"
            (load_part if self.saves_part else load_full)(self.model, best)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled and self.saves_part:
            # Without this flag DeepSpeed writes the frozen language model into every checkpoint.
            engine: Any = self.model_wrapped
            engine.save_checkpoint(output_dir, exclude_frozen_parameters=True)
            if self.args.should_save and self.lr_scheduler is not None:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")
            return
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Refuse a state under which the flags' optimizer or rates would not be what steps."""
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.optimizer is not None, "the Trainer makes it before it loads its state"
        flags = [_rates(group) for group in self.optimizer.param_groups]
        optim = _value(self.args.optim)
        other = f"{checkpoint}: its optimizer's state is not one of --optim {optim}"
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (ValueError, KeyError) as error:
            raise InputError(f"{other} with these flags: {reason(error)}") from None
        for wanted, group in zip(flags, self.optimizer.param_groups, strict=True):
            found = _rates(group)
            if found.keys() != wanted.keys():
                raise InputError(other)
            for name in found:
                if found[name] != wanted[name]:
                    raise InputError(
                        f"{checkpoint} was trained with {name} {found[name]}, now it is "
                        f"{wanted[name]}; choose another --output_dir"
                    )

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if not (self.is_deepspeed_enabled and self.saves_part and resume_from_checkpoint):
            return super()._prepare_for_training(
                max_steps, train_dataloader, resume_from_checkpoint
            )
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        # The checkpoint lacks the frozen parameters on purpose, so it is loaded without `strict`.
        path, _ = self.model_wrapped.load_checkpoint(
            resume_from_checkpoint, load_module_strict=False
        )
        if path is None:
            raise InputError(f"{resume_from_checkpoint}: DeepSpeed finds no checkpoint there")
        scheduler = torch.load(Path(resume_from_checkpoint) / "scheduler.pt", weights_only=True)
        self.lr_scheduler.load_state_dict(scheduler)
        return prepared


def _shifted(factor: Callable[[int], float], before: int, step: int) -> float:
    return factor(step + before)


# What an optimizer's group holds of the flags; the rest is how torch computes a step.
_RATES = {"initial_lr": "learning_rate", "weight_decay": "weight_decay", "betas": "betas",
          "eps": "epsilon", "momentum": "momentum"}  # fmt: skip


def _rates(group: dict) -> dict[str, Any]:
    return {_RATES[key]: group[key] for key in sorted(_RATES.keys() & group.keys())}


def _value(optim: Any) -> str:
    return str(getattr(optim, "value", optim))


def save_part(model: nn.Module, folder: str | os.PathLike, write: bool = True) -> None:
    """Write LoRA and what trains beside it, or the projector alone: `load_part` reads it back.

    Every rank calls it, since ZeRO-3 gathers; those that `write` write.
    """
    if is_lora(model):
        save_lora(model, folder, write)
        return
    state = projector_state(model)
    if write:
        save(state, Path(folder) / PROJECTOR_FILE)


def load_part(model: nn.Module, folder: str | os.PathLike) -> None:
    """Load what `save_part` wrote into a model of the same make."""
    if is_lora(model):
        load_lora(model, folder)
    else:
        file = Path(folder) / PROJECTOR_FILE
        load_projector(model, load(file), str(file))


def steps_of(args: TrainingArguments, samples: int) -> int:
    """The number of optimizer steps of a run on `samples` samples, as the Trainer counts them."""
    if not samples:
        return 0
    if args.max_steps > 0:
        return args.max_steps
    batches = math.ceil(samples / (args.train_batch_size * args.world_size))
    per_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    return math.ceil(per_epoch * args.num_train_epochs)


def last_checkpoint(output_dir: str) -> str | None:
    """The newest complete `checkpoint-N` of a folder, or None.

    A checkpoint's `trainer_state.json` is written last; a folder without a whole one is what a
    killed run left behind, or weights that somebody keeps there (upstream writes none beside a
    projector). It is put away, so that it is not counted when old ones are rotated out.
    """

    complete = []
    for folder in checkpoints(Path(output_dir)):
        file = folder / "trainer_state.json"
        try:
            json.loads(file.read_text())
            complete.append(folder)
        except (FileNotFoundError, ValueError):
            if int(os.environ.get("RANK", 0)) == 0:
                _put_away(folder)
        except OSError as error:  # a disk or network that fails now may work again
            raise InputError(f"{file} cannot be read: {error.strerror}") from None
    return str(complete[-1]) if complete else None


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders `checkpoint-N`, by step."""
    found = [p for p in output_dir.glob("checkpoint-*") if _step(p) is not None and p.is_dir()]
    return sorted(found, key=lambda path: _step(path) or 0)


def _step(folder: Path) -> int | None:
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else None


def remove_oldest(output_dir: Path, limit: int, best: str | None = None) -> None:
    """Keep the `limit` newest checkpoints by step, of them always the last, and the best one."""
    found = checkpoints(output_dir)
    kept = {found[-1].name, *([Path(best).name] if best else [])} if found else set()
    old = [folder for folder in found if folder.name not in kept]
    for folder in old[: max(len(found) - max(limit, len(kept)), 0)]:
        shutil.rmtree(folder, ignore_errors=True)


def _put_away(folder: Path) -> None:
    """Rename it where its weights are whole, which config.json tells, written after them; a save
    that was cut off before is removed."""
    if "config.json" not in os.listdir(folder):
        shutil.rmtree(folder, ignore_errors=True)
        logger.info("%s: removed, its weights were not saved whole", folder)
        return
    name = f"incomplete-{folder.name}"
    names = chain([name], (f"{name}.{n}" for n in count(2)))
    aside = next(path for path in map(folder.with_name, names) if not path.exists())
    folder.rename(aside)
    logger.info("%s: cannot be continued; now called %s", folder, aside.name)


class _SeedEachEpoch(TrainerCallback):
    """Seeds a generator with the run's seed and the epoch's number when an epoch begins."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator

    def on_epoch_begin(self, args, state, control, **kwargs):
        epoch = int(state.epoch + 1e-6)  # a resumed run stands within its epoch
        self.generator.manual_seed(args.seed + epoch)


class PlainProgress(TrainerCallback):
    """One plain line per log where there is no terminal to draw a bar on."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs and "loss" in logs:
            shown = {k: logs[k] for k in ("loss", "grad_norm", "learning_rate") if k in logs}
            values = " ".join(f"{key} {float(value):.4g}" for key, value in shown.items())
            print(f"step {state.global_step}/{state.max_steps} {values}", flush=True)
