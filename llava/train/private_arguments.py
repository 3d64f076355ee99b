"""The flags of private training, `--fed_dp_*`, and what is refused beside them before a model
loads.

With an epsilon or a noise given, every step's gradient is a sum of per-sample gradients, each
clipped, with Gaussian noise (`llava.train.private_trainer`). What a flag would do to a step's
samples or to their gradients, so that a step is no longer that, is refused here; what depends on
the model is refused in `llava.train.private_gradients`.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, field
from typing import ClassVar

from llava.errors import InputError
from llava.train.arguments import TrainingArguments

LARGEST = 500.0  # epsilon; e^500 to one protects nobody
# Optimizers that step each tensor within the backward pass, on what has neither clipping nor noise.
_IN_BACKWARD = frozenset(
    "lomo adalomo galore_adamw_layerwise galore_adamw_8bit_layerwise galore_adafactor_layerwise "
    "apollo_adamw_layerwise".split()
)
_BY_LOSS = frozenset({"reduce_lr_on_plateau", "greedy"})  # schedules
_REFUSED = {  # flag → why; refused where it is set at all
    "deepspeed": "its engine sums gradients as they arise, before each sample's could be clipped",
    "fsdp": "it sums gradients as they arise, before each sample's could be clipped",
    "fp16": "the scale of its loss follows the data; --bf16 True is expected",
    "group_by_modality_length": "which samples share a step must not follow from what is in them",
    "label_smoothing_factor": "the loss of a sample is the mean over its own labelled tokens",
    "auto_find_batch_size": "a step has a fixed number of samples",
    "load_best_model_at_end": "the choice would be made by a loss without noise",
    "ignore_data_skip": "a run that goes on would see samples again",
    "use_liger_kernel": "its kernels pass by the layers at which gradients are taken",
    "torch_compile": "compiled layers are passed by where gradients are taken",
    "neftune_noise_alpha": "its draws follow from --seed and from how long the samples are",
    "push_to_hub": "the folder holds the secret of the noise while the run is at work",
}


@dataclass
class PrivacyArguments:
    """Differential privacy of a record in training."""

    DECIDING: ClassVar = frozenset(
        "fed_dp_epsilon fed_dp_noise fed_dp_delta fed_dp_clip fed_dp_metrics".split()
    )

    fed_dp_epsilon: float | None = field(
        default=None,
        metadata={
            "help": "Private training: what the run may reveal of a record, with --fed_dp_delta. "
            "The noise follows from it."
        },
    )
    fed_dp_noise: float | None = field(
        default=None,
        metadata={
            "help": "Private training: the noise's standard deviation, in units of --fed_dp_clip, "
            "in place of --fed_dp_epsilon."
        },
    )
    fed_dp_delta: float | None = field(
        default=None, metadata={"help": "Private training: delta, at most 1 / records."}
    )
    fed_dp_clip: float | None = field(
        default=None,
        metadata={
            "help": "Private training: the longest gradient of a sample, all tensors jointly."
        },
    )
    fed_dp_metrics: str = field(
        default="off",
        metadata={
            "help": "Private training: what clients tell beside their update. off: no loss, no "
            "time, nothing that was measured on their data."
        },
    )

    @property
    def private(self) -> bool:
        """Whether training is private."""
        return self.fed_dp_epsilon is not None or self.fed_dp_noise is not None


def check_privacy(privacy: PrivacyArguments) -> None:
    """Refuse flags of private training that are out of range or do not go together."""
    names = "--fed_dp_epsilon or --fed_dp_noise"
    given = {name: getattr(privacy, name) for name in sorted(PrivacyArguments.DECIDING)}
    for name in ("fed_dp_clip", "fed_dp_delta"):
        if not privacy.private and given[name] is not None:
            raise InputError(f"--{name} is for private training: {names} is expected, too")
        if privacy.private and given[name] is None:
            raise InputError(f"private training needs --{name}")
    if privacy.fed_dp_metrics != "off":
        raise InputError(f"--fed_dp_metrics is {privacy.fed_dp_metrics!r}; known is off")
    if not privacy.private:
        return
    if privacy.fed_dp_epsilon is not None and privacy.fed_dp_noise is not None:
        raise InputError(f"one of {names} is expected, found both: each follows from the other")
    for name, most in (
        ("fed_dp_epsilon", LARGEST),
        ("fed_dp_noise", math.inf),
        ("fed_dp_clip", math.inf),
        ("fed_dp_delta", 1.0),
    ):
        value = given[name]
        if value is not None and not (0 < value <= most and value < math.inf):
            end = "" if most == math.inf else f" and at most {most:g}"
            raise InputError(f"--{name} is {value:g}, more than 0{end} is expected")
    for package in ("opacus", "cryptography"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"private training needs {package}: pip install 'fedllava[privacy]'")


def check_goes_with(args: TrainingArguments) -> None:
    """Refuse flags with which a step would not be a sum of clipped gradients with noise."""
    for flag, why in _REFUSED.items():
        value = getattr(args, flag, None)
        if value:
            shown = value if isinstance(value, (str, int, float)) else True
            raise InputError(f"--{flag} {shown} has no place in private training: {why}")
    if args.bits < 16:
        raise InputError(
            f"--bits {args.bits} has no place in private training: gradients are taken at layers "
            "of floating-point weights; --bits 16 is expected"
        )
    if args.lora_enable and args.lora_dropout:
        raise InputError(
            f"--lora_dropout {args.lora_dropout} has no place in private training: what is dropped "
            "follows from --seed and from how long the samples are; 0 is expected"
        )
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if schedule in _BY_LOSS:
        raise InputError(
            f"--lr_scheduler_type {schedule} has no place in private training: it follows a loss"
        )
    optim = str(getattr(args.optim, "value", args.optim))
    if optim in _IN_BACKWARD:
        raise InputError(
            f"--optim {optim} has no place in private training: it steps within the backward pass, "
            "before anything is clipped or has noise"
        )
    # An earlier transformers has `group_by_length` in place of the other two.
    strategy = getattr(args, "train_sampling_strategy", "random")
    if strategy not in ("random", "sequential") or getattr(args, "group_by_length", False):
        raise InputError(
            f"--train_sampling_strategy {strategy} has no place in private training: which samples "
            "share a step must not follow from what is in them"
        )
    if getattr(args.accelerator_config, "use_seedable_sampler", True) is False:
        raise InputError(
            "--accelerator_config use_seedable_sampler false has no place in private training: the "
            "order of samples must follow from the seed alone"
        )
    if args.world_size > 1:
        raise InputError(
            f"private training is of one process, found {args.world_size}: samples are dealt out "
            "to several with some of them twice"
        )
    if str(args.resume_from_checkpoint or "").lower() not in ("", "false"):
        raise InputError(
            f"--resume_from_checkpoint {args.resume_from_checkpoint} has no place in private "
            "training: steps of other flags would not be counted; a run that was cut short goes on "
            "by itself"
        )
    if samples_of_step(args) < 2:
        raise InputError(
            "a step of one sample has no place in private training: "
            "--per_device_train_batch_size times --gradient_accumulation_steps is 1, 2 or more is "
            "expected"
        )


def samples_of_step(args: TrainingArguments) -> int:
    """The number of samples of a full optimizer step, by which every step's sum is divided."""
    return args.train_batch_size * args.gradient_accumulation_steps
