"""The flags of LLaVA's training scripts, with upstream's names and defaults."""

from __future__ import annotations

import difflib
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import transformers
from transformers.integrations import is_deepspeed_zero3_enabled

from llava.errors import InputError
from llava.model.quantize import QUANT_TYPES, check_bitsandbytes


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
    unfreeze_mm_vision_tower: bool = field(
        default=False, metadata={"help": "Train the vision tower, too."}
    )
    pilot_tasks: list[str] = field(
        default_factory=list,
        metadata={"help": "pilot: the tasks, the own first; in a federated run clients.yaml says."},
    )
    pilot_stage: int = field(default=2, metadata={"help": "pilot: 1 or 2."})
    pilot_init: str = field(
        default="split",
        metadata={
            "help": "pilot: added adapters start at 0 (split), or as a copy of the projector."
        },
    )
    pilot_top_k: int = field(default=0, metadata={"help": "pilot: experts a token; 0: all."})
    pilot_difference: float = field(
        default=0.1, metadata={"help": "pilot: weight of the difference loss of stage 1."}
    )
    pilot_difference_over: str = field(
        default="pairs", metadata={"help": "pilot: its scale, pairs, mean or sum."}
    )
    pilot_balance: float = field(
        default=0.1, metadata={"help": "pilot: weight of the balance loss of stage 2."}
    )
    pilot_z: float = field(
        default=0.01, metadata={"help": "pilot: weight of the router-z loss of stage 2."}
    )
    pilot_client_adapter: bool = field(
        default=True, metadata={"help": "pilot: False leaves the client adapter out."}
    )
    pilot_mixture: bool = field(
        default=True, metadata={"help": "pilot: False leaves the mixture of adapters out."}
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
    files = [value for flag, value in pairwise(argv) if flag == "--deepspeed"]
    if files:
        _check_deepspeed(files[-1])
        _start_process_group("nccl" if torch.cuda.is_available() else "gloo")
    parser = _Parser(kinds or (ModelArguments, DataArguments, TrainingArguments))
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            argv, look_for_args_file=False, return_remaining_strings=True
        )
    except (ValueError, ImportError, OSError) as error:
        raise InputError(str(error)) from None
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        known = [option for option in options if "_" in option or "-" not in option[2:]]
        close = difflib.get_close_matches(unknown[0], known, n=3)
        hint = f" (did you mean {' or '.join(close)}?)" if close else ""
        raise InputError(f"unknown flag {unknown[0]}{hint}")
    by_kind = {type(arguments): arguments for arguments in parsed}
    if TrainingArguments in by_kind:
        _check(by_kind[TrainingArguments])
    if {ModelArguments, DataArguments, TrainingArguments} <= by_kind.keys():
        _check_what_trains(
            by_kind[ModelArguments], by_kind[DataArguments], by_kind[TrainingArguments]
        )
    return tuple(parsed)


class _Parser(transformers.HfArgumentParser):
    """Says what is wrong in one sentence, without the two hundred flags of the usage."""

    def error(self, message: str):
        raise InputError(message)


def _check_deepspeed(file: str) -> None:
    try:
        with open(file) as opened:
            json.load(opened)
    except OSError as error:
        raise InputError(f"--deepspeed {file}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"--deepspeed {file}: this is not JSON: {error}") from None


def _start_process_group(backend: str) -> None:
    import logging
    import socket
    import warnings

    try:
        import deepspeed
    except ImportError as error:
        raise InputError(
            f"--deepspeed needs the package deepspeed: pip install 'fedllava[train]' ({error})"
        ) from None

    # What the libraries tell each other: DeepSpeed calls torch by old names, transformers leaves
    # gradient accumulation to DeepSpeed.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)
    logging.getLogger("accelerate.accelerator").addFilter(
        lambda record: "Gradient accumulation steps mismatch" not in record.getMessage()
    )

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
    if args.n_gpu < args._n_gpu:
        print(f"1 of {args._n_gpu} GPUs is used; start with deepspeed or torchrun to use all")
    if args.fp16 and args.device.type == "cpu":
        raise InputError("--fp16 True needs a GPU; a CPU trains in float32 or with --bf16 True")
    if args.bits < 16:
        check_bitsandbytes(args.bits)


def _check_what_trains(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments
) -> None:
    """Refuse flags that contradict each other about what trains."""
    tunes_tower = model_args.unfreeze_mm_vision_tower
    if model_args.mm_projector_type != "pilot":
        for name, default in vars(ModelArguments()).items():
            if name.startswith("pilot_") and getattr(model_args, name) != default:
                raise InputError(f"--{name} is for --mm_projector_type pilot")
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
