"""The Trainer: transformers' own, with LLaVA's sampler, learning rates and checkpoints.

A projector-only run saves the projector and its optimizer state, never the frozen model, and
resumes from that to the bit.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import Trainer
from transformers.trainer_callback import TrainerCallback

from llava.model.checkpoint import (
    PROJECTOR_FILE,
    load_projector,
    projector_state,
    write_config,
)
from llava.state import load, save
from llava.train.sampler import LengthGroupedSampler


class LLaVATrainer(Trainer):
    """`Trainer` that reads `tune_mm_mlp_adapter`, `mm_projector_lr`, `group_by_modality_length`."""

    @property
    def projector_only(self) -> bool:
        return getattr(self.args, "tune_mm_mlp_adapter", False)

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
        projector_lr = getattr(self.args, "mm_projector_lr", None)
        if self.optimizer is not None or projector_lr is None:
            return super().create_optimizer(model)
        model = self.model if model is None else model
        decay = set(self.get_decay_parameter_names(model))
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        groups: dict[tuple[bool, bool], dict] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            key = ("mm_projector" in name, name in decay)
            if key not in groups:
                groups[key] = {"params": [], "weight_decay": self.args.weight_decay * key[1]}
                if key[0]:
                    groups[key]["lr"] = projector_lr
            groups[key]["params"].append(parameter)
        self.optimizer = optimizer_class(list(groups.values()), **options)
        return self.optimizer

    # -- checkpoints of projector-only runs ------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.projector_only:
            super().save_model(output_dir, _internal_call)
            if self.args.should_save:
                write_config(self.model.config, output_dir or self.args.output_dir, full=True)
            return
        state = projector_state(self.model)  # on every rank: ZeRO-3 gathers
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            save(state, folder / PROJECTOR_FILE)
            write_config(self.model.config, folder, full=False)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        if not self.projector_only:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = Path(resume_from_checkpoint) / PROJECTOR_FILE
        load_projector(self.model, load(file), str(file))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled and self.projector_only:
            # Without this flag DeepSpeed writes the frozen language model into every checkpoint.
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
            if self.args.should_save and self.lr_scheduler is not None:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")
            return
        super()._save_optimizer_and_scheduler(output_dir)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if not (self.is_deepspeed_enabled and self.projector_only and resume_from_checkpoint):
            return super()._prepare_for_training(
                max_steps, train_dataloader, resume_from_checkpoint
            )
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        # The checkpoint lacks the frozen parameters on purpose, so it is loaded without `strict`.
        path, _ = self.model_wrapped.load_checkpoint(
            resume_from_checkpoint, load_module_strict=False
        )
        if path is None:
            raise ValueError(f"{resume_from_checkpoint}: DeepSpeed finds no checkpoint there")
        scheduler = torch.load(Path(resume_from_checkpoint) / "scheduler.pt", weights_only=True)
        self.lr_scheduler.load_state_dict(scheduler)
        return prepared


def last_checkpoint(output_dir: str) -> str | None:
    """The newest complete `checkpoint-N` of a folder, or None.

    A checkpoint's `trainer_state.json` is written last; a folder without a whole one is what a
    killed run left behind. It is removed, so that it is not counted when old ones are rotated out.
    """

    def step(folder: Path) -> int:
        number = folder.name.removeprefix("checkpoint-")
        return int(number) if number.isdigit() else -1

    complete = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        if step(folder) < 0 or not folder.is_dir():
            continue
        try:
            json.loads((folder / "trainer_state.json").read_text())
            complete.append(folder)
        except (OSError, ValueError):
            shutil.rmtree(folder, ignore_errors=True)
    return str(max(complete, key=step)) if complete else None


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
