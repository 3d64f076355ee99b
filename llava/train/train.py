"""The training entry, with upstream's flags.

python -m llava.train.train --model_name_or_path … --data_path …
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from llava.conversation import get_template
from llava.errors import InputError, one_clear_error, reason
from llava.folder_lock import sole_run
from llava.model.lora import find_all_linear_names
from llava.progress import progress_shown
from llava.train import private_run, private_statement
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments, parse
from llava.train.data import (
    CheckReport,
    DataCollatorForSupervisedDataset,
    LazySupervisedDataset,
    make_supervised_data_module,
)
from llava.train.distributed import start_process_group
from llava.train.feature_cache import FeatureCache
from llava.train.llava_trainer import LLaVATrainer, PlainProgress
from llava.train.private_arguments import PrivacyArguments, check_goes_with, check_privacy
from llava.train.private_model import check_model
from llava.train.private_trainer import PrivateTrainer
from llava.train.resume import SayWhereItBegins, record, starting_point
from llava.train.session import Session, load_session, smart_tokenizer_and_embedding_resize
from llava.train.settings import training_settings
from llava.train.upstream import preprocess, preprocess_multimodal, rank0_print
from llava.train.zero3 import (
    get_mm_adapter_state_maybe_zero_3,
    get_peft_state_maybe_zero_3,
    get_peft_state_non_lora_maybe_zero_3,
    maybe_zero_3,
    safe_save_model_for_hf_trainer,
)

logger = logging.getLogger("llava.train.train")  # `__main__`, too, as a command

# What programs written for upstream import from here.
__all__ = [
    "DataArguments",
    "DataCollatorForSupervisedDataset",
    "LLaVATrainer",
    "LazySupervisedDataset",
    "ModelArguments",
    "TrainingArguments",
    "find_all_linear_names",
    "get_mm_adapter_state_maybe_zero_3",
    "get_peft_state_maybe_zero_3",
    "get_peft_state_non_lora_maybe_zero_3",
    "load_session",
    "make_supervised_data_module",
    "maybe_zero_3",
    "preprocess",
    "preprocess_multimodal",
    "rank0_print",
    "safe_save_model_for_hf_trainer",
    "smart_tokenizer_and_embedding_resize",
    "train",
]


def prepare_output(args: TrainingArguments) -> list[transformers.TrainerCallback]:
    """Find out before anything is loaded whether the run can write and report.

    Returns:
        The callbacks that --report_to names.
    """
    try:
        os.makedirs(args.output_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.output_dir):
            pass
    except OSError as error:
        raise InputError(f"--output_dir {args.output_dir}: {error.strerror}") from None
    try:
        return [kind() for kind in get_reporting_integration_callbacks(args.report_to)]
    except (ValueError, RuntimeError, ImportError) as error:
        raise InputError(f"--report_to {args.report_to}: {error}") from None


def prepare(
    dataset: LazySupervisedDataset, title: str, cache: FeatureCache | None, world_size: int = 1
) -> CheckReport:
    """Check a data set whole, say what was cut or left out, and fill the feature cache for it.

    In a run of several processes only a cache on disk is filled, each process its share.
    """
    dataset.feature_cache = cache
    rank = torch.distributed.get_rank() if world_size > 1 else 0
    if cache is not None and (world_size == 1 or cache.directory is not None):
        # What cannot be read is left out here, and named or skipped by the check.
        cache.prefetch(dataset.pictures()[rank::world_size], progress=sys.stderr.isatty())
    report = dataset.check()
    notes = ""
    if report.truncated:
        notes += f", {report.truncated} longer than --model_max_length: their text is cut"
    if report.skipped:
        notes += f", {report.skipped} skipped for a bad picture"
    if report.unlabelled:
        notes += f", {report.unlabelled} left out: their answers are empty or cut off"
    if rank == 0:
        logger.info("%s: %d samples%s", title, report.samples, notes)
    return report


def make_trainer(
    session: Session,
    training_args: TrainingArguments,
    kind: type[LLaVATrainer] = LLaVATrainer,
    progress: bool = True,
    **kwargs: Any,
) -> LLaVATrainer:
    """A trainer of this session; `progress`: a bar on a terminal, plain lines elsewhere."""
    bar = progress and sys.stderr.isatty() and not training_args.disable_tqdm
    try:
        trainer = kind(
            model=session.model, args=training_args, processing_class=session.tokenizer, **kwargs
        )
    except ImportError as error:  # of a package that a flag asks for
        raise InputError(reason(error)) from None
    trainer.remove_callback(PrinterCallback)
    if not bar:
        trainer.remove_callback(ProgressCallback)
        if progress:
            trainer.add_callback(PlainProgress)
    return trainer


@progress_shown()
def train(attn_implementation: str | None = None, argv: Sequence[str] | None = None) -> None:
    """Train as the command line says; resumes by itself from a checkpoint in --output_dir.

    A folder that holds another run is refused: `llava.train.resume`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if attn_implementation:
        argv = ["--attn_implementation", attn_implementation, *argv]  # a later one is stronger
    start_process_group(argv)
    model_args, data_args, training_args, privacy = parse(
        [*argv, "--prediction_loss_only", "True"],
        ModelArguments,
        DataArguments,
        TrainingArguments,
        PrivacyArguments,
    )
    check_privacy(privacy)
    if privacy.private:
        check_goes_with(training_args)
    if training_args.eval_strategy != "no" and not data_args.eval_data_path:
        raise InputError(f"--eval_strategy {training_args.eval_strategy} needs --eval_data_path")
    if model_args.version:
        get_template(model_args.version)
    for flag in ("data_path", "eval_data_path"):
        file = getattr(data_args, flag)
        if file and not os.path.exists(file):
            raise InputError(f"--{flag} {file}: no such file")
    prepare_output(training_args)
    with sole_run(training_args.output_dir, main=training_args.process_index == 0):
        _train(model_args, data_args, training_args, privacy)


def _train(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
    privacy: PrivacyArguments,
) -> None:
    """A run whose flags are good."""
    settings = training_settings(model_args, data_args, training_args, privacy)
    checkpoint = starting_point(training_args, settings)
    if privacy.private and private_statement.finished(Path(training_args.output_dir)):
        logger.info("%s: already trained, nothing to do", training_args.output_dir)
        return
    session = load_session(model_args, data_args, training_args)
    data = make_supervised_data_module(session.tokenizer, data_args, session.sample_format)
    # In memory the features of a picture that is seen once are of no use to anybody.
    reused = training_args.num_train_epochs > 1 or data_args.feature_cache != "memory"
    for name, title in (("train_dataset", "training"), ("eval_dataset", "validation")):
        if data[name] is not None:
            cache = session.feature_cache if reused or name == "eval_dataset" else None
            prepare(data[name], title, cache, training_args.world_size)
    how: dict[str, Any] = {}
    if privacy.private:
        check_model(session.model)
        stated, steps = private_run.begin(privacy, training_args, data["train_dataset"], settings)
        how = {"kind": PrivateTrainer, "private": steps}
    trainer = make_trainer(session, training_args, callbacks=[SayWhereItBegins()], **how, **data)
    record(training_args, settings)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_state()
    session.model.config.use_cache = True
    trainer.save_model()
    if privacy.private:
        output = Path(training_args.output_dir)
        private_run.finish(output, {"run": stated}, output.absolute().name)


def main() -> None:
    with one_clear_error():
        train()


if __name__ == "__main__":
    main()
