"""The flags of LLaVA's training scripts, with upstream's names and defaults."""

from __future__ import annotations

import difflib
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import transformers

from llava.errors import InputError


@dataclass
class ModelArguments:
    model_name_or_path: str = field(default="facebook/opt-125m")
    version: str = field(default="v0", metadata={"help": "Conversation template, e.g. plain, v1."})
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


@dataclass
class DataArguments:
    data_path: str | None = field(default=None, metadata={"help": "LLaVA JSON to train on."})
    eval_data_path: str | None = field(
        default=None, metadata={"help": "LLaVA JSON for a validation loss (with --eval_strategy)."}
    )
    is_multimodal: bool = field(default=False)
    image_folder: str | None = field(default=None)
    image_aspect_ratio: str = field(default="square")
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
    double_quant: bool = field(default=True)
    quant_type: str = field(default="nf4")
    bits: int = field(default=16)
    lora_enable: bool = field(default=False)
    lora_r: int = 64
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    lora_weight_path: str = ""
    lora_bias: str = "none"
    mm_projector_lr: float | None = None
    group_by_modality_length: bool = field(default=False)
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager or flash_attention_2 (needs a GPU)."}
    )


def modernise(argv: Sequence[str]) -> list[str]:
    """Upstream's command line for today's transformers: renamed flags and dropped ones."""
    renamed = {"--evaluation_strategy": "--eval_strategy", "--warmup_ratio": "--warmup_steps"}
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

    Where there is no GPU the CPU is chosen and `--tf32` dropped, so that one script serves both
    kinds of machine. Starts the process group of a `--deepspeed` run, which must stand before the
    model is made, or ZeRO-3 would take the world for one process.

    Raises:
        InputError: an unknown flag (with the near names), or a value of the wrong type.
    """
    import torch

    argv = modernise(sys.argv[1:] if argv is None else argv)
    if not torch.cuda.is_available():
        argv = _without(argv, "--tf32")
        if "--use_cpu" not in argv:
            argv += ["--use_cpu", "True"]
    if "--deepspeed" in argv[:-1]:
        file = argv[argv.index("--deepspeed") + 1]
        if not os.path.isfile(file):
            raise InputError(f"--deepspeed {file}: no such file")
        _start_process_group("nccl" if torch.cuda.is_available() else "gloo")
    parser = _Parser(kinds or (ModelArguments, DataArguments, TrainingArguments))
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            argv, look_for_args_file=False, return_remaining_strings=True
        )
    except (ValueError, ImportError, OSError) as error:
        raise InputError(str(error)) from None
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        close = difflib.get_close_matches(unknown[0], known, n=3)
        hint = f" (did you mean {' or '.join(close)}?)" if close else ""
        raise InputError(f"unknown flag {unknown[0]}{hint}")
    for arguments in parsed:
        if isinstance(arguments, TrainingArguments):
            _check(arguments)
    return tuple(parsed)


class _Parser(transformers.HfArgumentParser):
    """Says what is wrong in one sentence, without the two hundred flags of the usage."""

    def error(self, message: str):
        raise InputError(message)


def _start_process_group(backend: str) -> None:
    import socket

    import deepspeed

    if "RANK" not in os.environ:  # started without a launcher: a world of one
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    deepspeed.init_distributed(backend)


def _without(argv: list[str], flag: str) -> list[str]:
    """`argv` without any `flag` and the value that may follow it."""
    while flag in argv:
        at = argv.index(flag)
        values = 1 if at + 1 < len(argv) and not argv[at + 1].startswith("--") else 0
        argv = argv[:at] + argv[at + 1 + values :]
    return argv


def _check(args: TrainingArguments) -> None:
    """Refuse what is not supported yet, and numbers with which nothing could train."""
    if args.lora_enable:
        raise InputError("--lora_enable True is not supported yet")
    if args.bits != 16:
        raise InputError(f"--bits {args.bits} is not supported yet; 16 is")
    for flag in (
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "num_train_epochs",
        "logging_steps",
        "model_max_length",
    ):
        if not getattr(args, flag) > 0:
            raise InputError(f"--{flag} is {getattr(args, flag)}, more than 0 is expected")
    if not 0 <= args.learning_rate < math.inf:
        raise InputError(f"--learning_rate is {args.learning_rate}, a number >= 0 is expected")
