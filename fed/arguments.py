"""The flags that make a training run a federated one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.train.private_arguments import PrivacyArguments

# What a client may have of its own: its pictures' processing, and how it steps.
CLIENT_FLAGS = (
    "image_aspect_ratio",
    "skip_bad_images",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_ratio",
    "warmup_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "group_by_modality_length",
    "dataloader_num_workers",
    "logging_steps",
    "save_strategy",
    "save_steps",
    "save_total_limit",
)


@dataclass
class FedArguments(PrivacyArguments):
    """The flags of every federated run.

    Those of a method (`Method.flags`) and of a driver (`Driver.flags`) are added on a command line.
    Such a class, too, may have `LEAST`, bounds by name, and `DECIDING`, the flags that decide the
    result of a run: one that is continued must have the same ones.
    """

    LEAST: ClassVar = {
        "fed_rounds": 1,
        "fed_clients_per_round": 0,
        "fed_eval_every": 0,
        "fed_min_clients": 0,
        "fed_secure_min": 2,
    }
    DECIDING: ClassVar = frozenset(
        "fed_rounds fed_method fed_clients_per_round fed_one_pass fed_lr_schedule fed_pool "
        "fed_wire fed_weighting fed_secure fed_secure_min fed_secure_norm fed_dp_shares".split()
    ).union(PrivacyArguments.DECIDING)

    fed_clients: str | None = field(
        default=None, metadata={"help": "clients.yaml: the clients and their data."}
    )
    fed_rounds: int = field(default=1, metadata={"help": "Rounds of the run."})
    fed_method: str = field(default="fedavg", metadata={"help": "How updates become one state."})
    fed_options: list[str] = field(
        default_factory=list, metadata={"help": "The method's options: [FILE.yaml] name=value …"}
    )
    fed_clients_per_round: int = field(
        default=0,
        metadata={
            "help": "How many clients take part in a round, drawn anew; 0: all.",
        },
    )
    fed_one_pass: bool = field(
        default=True,
        metadata={"help": "A round sees its slice of a shard, each sample once a run; else all."},
    )
    fed_lr_schedule: str | None = field(
        default=None,
        metadata={
            "help": "The schedule spans the `run` (default; llava.train knows how), or starts anew "
            "each `round` (default of --fed_driver script)."
        },
    )
    fed_pool: bool = field(
        default=False,
        metadata={"help": "Put all clients' data in one place: the centralised reference."},
    )
    fed_eval_data_path: list[str] = field(
        default_factory=list, metadata={"help": "LLaVA JSON files to measure on."}
    )
    fed_eval_image_folder: str | None = field(
        default=None, metadata={"help": "Their pictures; --image_folder when not given."}
    )
    fed_eval_domain: str = field(
        default="domain", metadata={"help": "The key of a record that names its domain."}
    )
    fed_eval_every: int = field(
        default=1,
        metadata={"help": "Measure every N rounds and after the last; 0: never."},
    )
    fed_eval_explained: bool = field(
        default=False,
        metadata={
            "help": "Measure also what share of the captions the pictures explain; measuring then "
            "takes twice as long."
        },
    )
    fed_driver: str = field(
        default="resident",
        metadata={
            "help": "How clients are run: `resident` (one process), `script` (one each), or "
            "`remote` (on other machines)."
        },
    )
    fed_wire: str = field(
        default="float32",
        metadata={
            "help": "What a client sends: its state in `float32`, or what it changed in `bf16`, "
            "half as long."
        },
    )
    fed_weighting: str = field(
        default="samples",
        metadata={
            "help": "What a client weighs: its `samples`, or these times the share of its captions "
            "that its pictures explain, `explained`."
        },
    )
    fed_min_clients: int = field(
        default=0,
        metadata={
            "help": "With how many clients a round goes on if others fail; 0: all.",
        },
    )
    fed_secure: bool = field(
        default=False,
        metadata={"help": "The server gets sums over clients, and no single client's update."},
    )
    fed_secure_min: int = field(
        default=3, metadata={"help": "The fewest clients whose sum the server may get."}
    )
    fed_secure_norm: float = field(
        default=1000.0,
        metadata={
            "help": "The largest length of a client's update, or of one layer of it, that a secure "
            "sum has room for."
        },
    )
    fed_dp_shares: bool = field(
        default=False,
        metadata={
            "help": "Private training with secure sums: --fed_secure_min clients add the noise "
            "together, a share each."
        },
    )


def own_flags(part: Any) -> tuple[dataclasses.Field, ...]:
    """The fields of the flags that a method or a driver has of its own."""
    return dataclasses.fields(part.flags) if part.flags else ()


def declared(kind: type, name: str) -> Iterator[Any]:
    """The `LEAST` or `DECIDING` of a class of flags and of all that it is made of."""
    return (vars(base)[name] for base in kind.__mro__ if name in vars(base))


class Arguments(NamedTuple):
    """The command line of a federated run."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    fed: FedArguments
