"""The training entry, with upstream's flags.

python -m llava.train.train --model_name_or_path … --data_path …
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback

from llava.errors import InputError, one_clear_error
from llava.model.builder import add_picture_tokens, from_pretrained, load_tokenizer
from llava.model.checkpoint import load_projector, read_config
from llava.model.multimodal_encoder.clip_encoder import build_vision_tower
from llava.state import load
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments, parse
from llava.train.data import (
    CheckReport,
    LazySupervisedDataset,
    make_supervised_data_module,
    picture_pixels,
)
from llava.train.feature_cache import FeatureCache
from llava.train.llava_trainer import LLaVATrainer, PlainProgress, last_checkpoint


@dataclass
class Session:
    """A model with what its data needs: everything that is loaded once."""

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    feature_cache: FeatureCache | None


def load_session(
    model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments
) -> Session:
    """Load language model, tower, projector and tokenizer as the flags say; set what trains.

    Fills `data_args.image_processor`, `.image_tokens`, `.is_multimodal`, `.version` and
    `.mm_use_im_start_end`, which the data sets read.
    """
    # Seeded here and not by the Trainer, since a fresh projector is drawn now.
    transformers.set_seed(training_args.seed)
    training_args.tune_mm_mlp_adapter = model_args.tune_mm_mlp_adapter

    config = read_config(model_args.model_name_or_path)
    _set_multimodal_keys(config, model_args, data_args, training_args)
    attention = choose_attention(training_args.attn_implementation, training_args.device.type)
    model = from_pretrained(
        model_args.model_name_or_path,
        config,
        dtype=torch.bfloat16 if training_args.bf16 else torch.float32,
        attn_implementation=attention,
        cache_dir=training_args.cache_dir,
    )
    model.config.use_cache = False
    tokenizer = _training_tokenizer(model_args, training_args, model)
    data_args.version = model_args.version
    data_args.image_tokens = 1
    data_args.mm_use_im_start_end = model_args.mm_use_im_start_end

    feature_cache = None
    if model_args.vision_tower:
        feature_cache = _attach_vision(model, tokenizer, model_args, data_args, training_args)
    _choose_trainable(model, model_args, training_args)
    if training_args.gradient_checkpointing and not model_args.vision_tower:
        model.enable_input_require_grads()
    return Session(model, tokenizer, feature_cache)


def _set_multimodal_keys(config, model_args, data_args, training_args) -> None:
    """The mm_* keys in the config, which decide how the model is built and end in config.json."""
    config.tokenizer_padding_side = "right"
    config.tokenizer_model_max_length = training_args.model_max_length
    if not model_args.vision_tower:
        return
    config.mm_vision_tower = model_args.vision_tower
    config.mm_hidden_size = build_vision_tower(config, delay_load=True).hidden_size
    config.use_mm_proj = True
    config.image_aspect_ratio = data_args.image_aspect_ratio
    config.tune_mm_mlp_adapter = model_args.tune_mm_mlp_adapter
    config.freeze_mm_mlp_adapter = training_args.freeze_mm_mlp_adapter
    config.mm_projector_lr = training_args.mm_projector_lr
    for key in (
        "mm_projector_type",
        "mm_vision_select_layer",
        "mm_vision_select_feature",
        "mm_patch_merge_type",
        "mm_use_im_start_end",
        "mm_use_im_patch_token",
    ):
        setattr(config, key, getattr(model_args, key))


def choose_attention(requested: str | None, device: str) -> str:
    """`requested`, except that flash_attention_2 becomes sdpa where it cannot run, with a word."""
    if requested != "flash_attention_2":
        return requested or "sdpa"
    from transformers.utils import is_flash_attn_2_available

    if device == "cuda" and is_flash_attn_2_available():
        print("attention: flash_attention_2", flush=True)
        return requested
    print("attention: sdpa (flash_attention_2 needs a GPU and the flash-attn package)", flush=True)
    return "sdpa"


def _training_tokenizer(model_args, training_args, model):
    tokenizer = load_tokenizer(
        model_args.model_name_or_path,
        cache_dir=training_args.cache_dir,
        model_max_length=training_args.model_max_length,
        padding_side="right",
    )
    if model_args.version == "v0" and tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        model.resize_token_embeddings(len(tokenizer))
    elif tokenizer.unk_token is not None:
        tokenizer.pad_token = tokenizer.unk_token
    elif tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _attach_vision(model, tokenizer, model_args, data_args, training_args) -> FeatureCache | None:
    dtype = (
        torch.bfloat16
        if training_args.bf16
        else torch.float16
        if training_args.fp16
        else torch.float32
    )
    tower = model.load_vision_tower(dtype=dtype, device=training_args.device)
    projector = model.get_model().mm_projector
    if not training_args.deepspeed:
        # AdamW in pure bfloat16 loses small updates; DeepSpeed keeps its own float32 copy.
        projector.float()
    if model_args.pretrain_mm_mlp_adapter:
        file = model_args.pretrain_mm_mlp_adapter
        load_projector(model, load(file), file)
    add_picture_tokens(model, tokenizer)
    data_args.image_processor = tower.image_processor
    data_args.image_tokens = projector.num_tokens(tower.num_patches)
    data_args.is_multimodal = True
    return make_feature_cache(tower, data_args)


def make_feature_cache(tower, data_args: DataArguments) -> FeatureCache | None:
    """The cache that `--feature_cache` asks for; keyed by the tower and by the processing."""
    if data_args.feature_cache == "off":
        return None
    if os.path.exists(data_args.feature_cache) and not os.path.isdir(data_args.feature_cache):
        raise InputError(f"--feature_cache {data_args.feature_cache}: this is not a folder")
    in_memory = data_args.feature_cache == "memory"
    key = ""  # a cache that no other process reads needs no name, which costs a look at all weights
    if not in_memory:
        processing = f"{data_args.image_aspect_ratio} {tower.image_processor.to_json_string()}"
        key = hashlib.sha256((tower.fingerprint() + processing).encode()).hexdigest()
    return FeatureCache(
        encode=lambda pixels: tower(pixels.to(tower.dtype)).cpu(),
        preprocess=lambda path: picture_pixels(path, data_args),
        key=key,
        limit_bytes=int(data_args.feature_cache_gb * 1e9),
        directory=None if in_memory else data_args.feature_cache,
    )


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
    """Check a data set whole, say what was cut or skipped, and fill the feature cache for it.

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
    if rank == 0:
        print(f"{title}: {report.samples} samples{notes}", flush=True)
    return report


def _choose_trainable(model, model_args, training_args) -> None:
    if model_args.freeze_backbone or model_args.tune_mm_mlp_adapter:
        model.requires_grad_(False)
    projector = (
        getattr(model.get_model(), "mm_projector", None) if model_args.vision_tower else None
    )
    if projector is not None:
        projector.requires_grad_(not training_args.freeze_mm_mlp_adapter)
    elif model_args.tune_mm_mlp_adapter:
        raise InputError("--tune_mm_mlp_adapter True trains the projector: name a --vision_tower")
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(
            f"nothing would train: mm_projector_type {model_args.mm_projector_type}, "
            f"--tune_mm_mlp_adapter {model_args.tune_mm_mlp_adapter}, "
            f"--freeze_mm_mlp_adapter {training_args.freeze_mm_mlp_adapter}"
        )


def make_trainer(
    session: Session,
    training_args: TrainingArguments,
    kind: type[LLaVATrainer] = LLaVATrainer,
    progress: bool = True,
    **kwargs,
) -> LLaVATrainer:
    """A trainer of this session; `progress`: a bar on a terminal, plain lines elsewhere."""
    training_args.disable_tqdm |= not (progress and sys.stderr.isatty())
    trainer = kind(
        model=session.model, args=training_args, processing_class=session.tokenizer, **kwargs
    )
    trainer.remove_callback(PrinterCallback)
    if progress and training_args.disable_tqdm:
        trainer.add_callback(PlainProgress)
    return trainer


def train(attn_implementation: str | None = None, argv: Sequence[str] | None = None) -> None:
    """Train as the command line says; resumes by itself from a checkpoint in --output_dir."""
    model_args, data_args, training_args = parse(argv)
    training_args.attn_implementation = training_args.attn_implementation or attn_implementation
    training_args.prediction_loss_only = True
    if training_args.eval_strategy != "no" and not data_args.eval_data_path:
        raise InputError(f"--eval_strategy {training_args.eval_strategy} needs --eval_data_path")
    prepare_output(training_args)
    session = load_session(model_args, data_args, training_args)
    data = make_supervised_data_module(session.tokenizer, data_args)
    # In memory the features of a picture that is seen once are of no use to anybody.
    reused = training_args.num_train_epochs > 1 or data_args.feature_cache != "memory"
    for name, title in (("train_dataset", "training"), ("eval_dataset", "validation")):
        if data[name] is not None:
            cache = session.feature_cache if reused or name == "eval_dataset" else None
            prepare(data[name], title, cache, training_args.world_size)
    trainer = make_trainer(session, training_args, **data)
    trainer.train(
        resume_from_checkpoint=training_args.resume_from_checkpoint
        or last_checkpoint(training_args.output_dir)
    )
    trainer.save_state()
    session.model.config.use_cache = True
    trainer.save_model()


def main() -> None:
    with one_clear_error():
        train()


if __name__ == "__main__":
    main()
