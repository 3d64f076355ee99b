"""The flags of LLaVA's training scripts, with upstream's names and defaults."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import transformers
from transformers.integrations import is_deepspeed_zero3_enabled

from llava.errors import InputError
from llava.model.multimodal_projector.connector import (
    connector_flags,
    connector_type,
    connector_types,
)
from llava.model.quantize import QUANT_TYPES, check_bitsandbytes
from llava.suggest import did_you_mean
from llava.transformers_private import gpus_without_launcher

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """The flags of a model; `parse` adds those of the connectors."""

    model_name_or_path: str = field(default="facebook/opt-125m")
    gguf_file: str | None = field(
        default=None,
        metadata={"help": "Which GGUF file of the folder --model_name_or_path is the model."},
    )
    version: str | None = field(
        default=None,
        metadata={
            "help": "Conversation template, e.g. plain, v1; else that of the tokenizer's own chat "
            "template, else v0."
        },
    )
    freeze_backbone: bool = field(default=False)
    tune_mm_mlp_adapter: bool = field(
        default=False, metadata={"help": "Train the projector alone; everything else is frozen."}
    )
    vision_tower: str | None = field(default=None)
    mm_vision_select_layer: int = field(default=-1)
    pretrain_mm_mlp_adapter: str | None = field(
        default=None, metadata={"help": "A projector (.bin or .safetensors) to start from."}
    )
    mm_projector_type: str = field(default="linear")
    mm_use_im_start_end: bool = field(default=False)
    mm_use_im_patch_token: bool = field(default=True)
    mm_patch_merge_type: str = field(default="flat")
    mm_vision_select_feature: str = field(default="patch")
    unfreeze_mm_vision_tower: bool = field(
        default=False, metadata={"help": "Train the vision tower, too."}
    )


@dataclass
class DataArguments:
    data_path: str | None = field(default=None, metadata={"help": "LLaVA JSON to train on."})
    eval_data_path: str | None = field(
        default=None, metadata={"help": "LLaVA JSON for a validation loss (with --eval_strategy)."}
    )
    is_multimodal: bool = field(default=False)
    image_folder: str | None = field(default=None)
    image_aspect_ratio: str = field(
        default="square", metadata={"help": "square, pad, or anyres (a large picture in tiles)."}
    )
    image_grid_pinpoints: str | None = field(
        default=None, metadata={"help": "For anyres: '[(336, 672), …]'; default: LLaVA-1.6's."}
    )
    skip_bad_images: bool = field(
        default=False, metadata={"help": "Leave out, and count, samples whose picture is bad."}
    )
    feature_cache: str = field(
        default="memory",
        metadata={
            "help": "Features of the frozen tower, once a picture: memory, off, or a folder."
        },
    )
    feature_cache_gb: float = field(default=4.0, metadata={"help": "Bound of the cache, in GB."})


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    output_dir: str = field(default="checkpoints/llava")
    cache_dir: str | None = field(default=None)
    optim: str = field(default="adamw_torch")
    remove_unused_columns: bool = field(default=False)
    report_to: None | str | list[str] = field(default="tensorboard")
    freeze_mm_mlp_adapter: bool = field(default=False)
    mpt_attn_impl: str | None = field(default="triton")
    model_max_length: int = field(
        default=512, metadata={"help": "Longest sequence, in tokens, picture tokens included."}
    )
    double_quant: bool = field(
        default=True, metadata={"help": "Quantise the scales of a 4-bit model, too."}
    )
    quant_type: str = field(default="nf4", metadata={"help": "Of a 4-bit model: nf4 or fp4."})
    bits: int = field(
        default=16, metadata={"help": "4 or 8: hold the frozen language model in so many bits."}
    )
    lora_enable: bool = field(
        default=False, metadata={"help": "Train LoRA in the language model, and the projector."}
    )
    lora_r: int = field(default=64)
    lora_alpha: int = field(default=16)
    lora_dropout: float = field(default=0.05)
    lora_weight_path: str = field(
        default="",
        metadata={"help": "A LoRA folder to go on from; its rank, alpha and dropout hold."},
    )
    lora_bias: str = field(
        default="none", metadata={"help": "Biases that train beside LoRA: none, all, lora_only."}
    )
    mm_projector_lr: float | None = field(default=None)
    mm_vision_tower_lr: float | None = field(default=None)
    group_by_modality_length: bool = field(default=False)
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager or flash_attention_2 (needs a GPU)."}
    )
    schedule_samples: list[int] = field(
        default_factory=list,
        metadata={"help": "One learning-rate schedule spans runs of so many samples each."},
    )
    schedule_round: int = field(
        default=1, metadata={"help": "Which of --schedule_samples this run is, from 1."}
    )

    def __post_init__(self) -> None:
        # Workers share the records and the features in memory; from Python 3.14 on, they would be
        # sent a copy each instead, which takes longer than training and the memory of them all.
        if sys.platform == "linux" and self.dataloader_num_workers > 0:
            self.dataloader_multiprocessing_context = (
                self.dataloader_multiprocessing_context or "fork"
            )
        super().__post_init__()

    @property
    def n_gpu(self) -> int:
        """0 or 1. A process takes one GPU: DataParallel would cut a batch whose positions count
        from its own start, and is the slowest way to several."""
        return min(super().n_gpu, 1)


def modernise(argv: Sequence[str]) -> list[str]:
    """Upstream's command line for today's transformers: renamed flags and dropped ones."""
    renamed = {"--evaluation_strategy": "--eval_strategy", "--warmup_ratio": "--warmup_steps"}
    if hasattr(transformers.TrainingArguments, "activation_checkpointing"):  # since 5.23
        for end in ("", "_kwargs"):
            renamed[f"--gradient_checkpointing{end}"] = f"--activation_checkpointing{end}"
    dropped = {"--lazy_preprocess"}
    out: list[str] = []
    argv = list(argv)
    while argv:
        word = argv.pop(0)
        flag, equals, value = word.partition("=")
        if not flag.startswith("--"):
            out.append(word)
            continue
        if equals:
            argv.insert(0, value)
        if flag not in dropped:
            out.append(renamed.get(flag, flag))
        elif argv and not argv[0].startswith("--"):
            argv.pop(0)
    return out


def parse(argv: Sequence[str] | None, *kinds: type) -> tuple:
    """Parse flags into dataclasses, by default (Model, Data, Training)Arguments.

    What stands for `ModelArguments` has the flags of all connectors, too. Where there is no GPU the
    CPU is chosen and `--tf32` dropped, so that one script serves both kinds of machine. A run with
    `--deepspeed` has called `llava.train.distributed.start_process_group` before.

    Raises:
        InputError: an unknown flag (with the near names), or a value of the wrong type.
    """
    import torch

    argv = modernise(sys.argv[1:] if argv is None else argv)
    if not torch.cuda.is_available():
        argv = _without(argv, "--tf32")
        if "--use_cpu" not in argv:
            argv += ["--use_cpu", "True"]
    check_deepspeed(argv)
    kinds = kinds or (ModelArguments, DataArguments, TrainingArguments)
    kinds = tuple(model_arguments() if kind is ModelArguments else kind for kind in kinds)
    parser = _Parser(cast(Any, kinds))
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            argv, look_for_args_file=False, return_remaining_strings=True
        )
    except (ValueError, ImportError, OSError) as error:
        raise InputError(str(error)) from None
    if unknown:
        known = [f"--{f.name}" for kind in kinds for f in dataclasses.fields(kind) if f.init]
        raise InputError(f"unknown flag {unknown[0]}{did_you_mean(unknown[0], known)}")
    parsed = [_with_gguf_named(part) for part in parsed]
    _check_together(parsed)
    return tuple(parsed)


def _with_gguf_named(parsed: Any) -> Any:
    """The arguments with --gguf_file in the path of --model_name_or_path, where it is used."""
    if not isinstance(parsed, ModelArguments) or not parsed.gguf_file:
        return parsed
    from llava.model.gguf import named

    path = named(parsed.model_name_or_path, parsed.gguf_file)
    return dataclasses.replace(parsed, model_name_or_path=path, gguf_file=None)


def model_arguments() -> type[ModelArguments]:
    """`ModelArguments` with the flags of all connectors."""
    return dataclasses.make_dataclass(
        "ModelArguments", [], bases=(ModelArguments, *connector_flags())
    )


def _check_together(parsed: Sequence[Any]) -> None:
    """Refuse values that are wrong by themselves or beside each other."""
    model_args = next((a for a in parsed if isinstance(a, ModelArguments)), None)
    data_args = next((a for a in parsed if isinstance(a, DataArguments)), None)
    training_args = next((a for a in parsed if isinstance(a, TrainingArguments)), None)
    if training_args is not None:
        _check(training_args)
    if model_args and data_args and training_args:
        _check_connector(model_args)
        _check_what_trains(model_args, data_args, training_args)


class _Parser(transformers.HfArgumentParser):
    """Says what is wrong in one sentence, without the two hundred flags of the usage."""

    def error(self, message: str):
        raise InputError(message)


def check_deepspeed(argv: Sequence[str]) -> str | None:
    """The file of `--deepspeed`, if one is given; `InputError` unless it is JSON."""
    files = [value for flag, value in pairwise(argv) if flag == "--deepspeed"]
    if not files:
        return None
    file = files[-1]
    try:
        with open(file) as opened:
            json.load(opened)
    except OSError as error:
        raise InputError(f"--deepspeed {file}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"--deepspeed {file}: this is not JSON: {error}") from None
    return file


def _without(argv: list[str], flag: str) -> list[str]:
    """`argv` without any `flag` and the value that may follow it."""
    while flag in argv:
        at = argv.index(flag)
        values = 1 if at + 1 < len(argv) and not argv[at + 1].startswith("--") else 0
        argv = argv[:at] + argv[at + 1 + values :]
    return argv


def _check(args: TrainingArguments) -> None:
    """Refuse values with which nothing could train, before anything is loaded."""
    for flag, known in (
        ("bits", (4, 8, 16)),
        ("quant_type", QUANT_TYPES),
        ("lora_bias", ("none", "all", "lora_only")),
    ):
        if getattr(args, flag) not in known:
            names = ", ".join(map(str, known))
            raise InputError(f"--{flag} is {getattr(args, flag)!r}; known are {names}")
    for flag in (
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "num_train_epochs",
        "logging_steps",
        "model_max_length",
        "lora_r",
        "lora_alpha",
    ):
        if not getattr(args, flag) > 0:
            raise InputError(f"--{flag} is {getattr(args, flag)}, more than 0 is expected")
    if not 0 <= args.learning_rate < math.inf:
        raise InputError(f"--learning_rate is {args.learning_rate}, a number >= 0 is expected")
    if not 0 <= args.lora_dropout < 1:
        raise InputError(f"--lora_dropout is {args.lora_dropout}, a number in [0, 1) is expected")
    gpus = gpus_without_launcher(args)
    if args.n_gpu < gpus:
        logger.info("1 of %d GPUs is used; start with deepspeed or torchrun to use all", gpus)
    if args.fp16 and args.device.type == "cpu":
        raise InputError("--fp16 True needs a GPU; a CPU trains in float32 or with --bf16 True")
    if args.bits < 16:
        check_bitsandbytes(args.bits)


def _check_connector(model_args: ModelArguments) -> None:
    """Refuse a connector that is not known, and flags of another one."""
    chosen, _ = connector_type(model_args.mm_projector_type)
    for kind in connector_types():
        if kind is chosen or kind.flags is None:
            continue
        for name, default in vars(kind.flags()).items():
            if getattr(model_args, name, default) != default:
                raise InputError(f"--{name} is for --mm_projector_type {kind.title}")


def _check_what_trains(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments
) -> None:
    """Refuse flags that contradict each other about what trains."""
    tunes_tower = model_args.unfreeze_mm_vision_tower
    if not model_args.vision_tower:
        if model_args.tune_mm_mlp_adapter:
            raise InputError(
                "--tune_mm_mlp_adapter True trains the projector: name a --vision_tower"
            )
        if tunes_tower:
            raise InputError("--unfreeze_mm_vision_tower True: name a --vision_tower")
    if args.lora_weight_path and not args.lora_enable:
        raise InputError(
            f"--lora_weight_path {args.lora_weight_path} is read with --lora_enable True only"
        )
    if model_args.tune_mm_mlp_adapter:
        alone = "--tune_mm_mlp_adapter True trains the projector alone: leave it out, or"
        if args.lora_enable:
            raise InputError(f"{alone} --lora_enable (LoRA trains the projector, too)")
        if tunes_tower:
            raise InputError(f"{alone} --unfreeze_mm_vision_tower")
    elif args.bits < 16 and not args.lora_enable:
        raise InputError(
            f"--bits {args.bits}: quantised weights do not train; --lora_enable True or "
            "--tune_mm_mlp_adapter True is expected"
        )
    if tunes_tower and data_args.feature_cache not in ("off", "memory"):
        raise InputError(
            f"--feature_cache {data_args.feature_cache}: what a tower that trains gives now, "
            "it does not give later"
        )
    if args.bits < 16 and is_deepspeed_zero3_enabled():
        raise InputError(
            f"--bits {args.bits}: ZeRO-3 cannot cut quantised weights; take scripts/zero2.json"
        )
