"""The flags that make a training run a federated one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from llava.train.arguments import DataArguments, TrainingArguments

# Flags that belong to the run as a whole, so that a client cannot have its own.
_OF_THE_RUN = {
    "data_path",
    "image_folder",
    "eval_data_path",
    "output_dir",
    "is_multimodal",
    "feature_cache",
    "feature_cache_gb",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
    "tf32",
    "deepspeed",
    "fsdp",
    "local_rank",
    "use_cpu",
    "report_to",
    "model_max_length",
    "bits",
    "attn_implementation",
}


@dataclass
class FedArguments:
    fed_clients: str | None = field(
        default=None, metadata={"help": "clients.yaml: the clients and their data."}
    )
    fed_rounds: int = field(default=1, metadata={"help": "Rounds of the run."})
    fed_method: str = field(default="fedavg", metadata={"help": "How updates become one state."})
    fed_options: list[str] = field(
        default_factory=list, metadata={"help": "The method's options: name=value …"}
    )
    fed_clients_per_round: int = field(
        default=0, metadata={"help": "How many clients take part in a round, drawn anew; 0: all."}
    )
    fed_one_pass: bool = field(
        default=True,
        metadata={"help": "A round sees its slice of a shard, each sample once a run; else all."},
    )
    fed_lr_schedule: str = field(
        default="run",
        metadata={"help": "The schedule spans the `run`, or starts anew each `round`."},
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
        default=1, metadata={"help": "Measure every N rounds and after the last; 0: never."}
    )
    fed_driver: str = field(
        default="resident", metadata={"help": "How clients are run: resident (one process)."}
    )


def client_flags() -> list[str]:
    """The flags that clients.yaml may override for one client."""
    fields = [*dataclasses.fields(DataArguments), *dataclasses.fields(TrainingArguments)]
    return sorted({f.name for f in fields if f.init} - _OF_THE_RUN)
