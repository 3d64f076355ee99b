"""What decides the result of a run: continued with anything else, it would be another run."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from fed import state
from fed.clients.clients_yaml import ClientSpec

# Flags that do not decide the result: a run may be continued with others.
FREE = re.compile(
    "output_dir|cache_dir|run_name|report_to|disable_tqdm|local_rank|use_cpu|feature_cache.*|"
    "trackio.*|per_device_eval_batch_size|attn_implementation|(logging|log|save|eval|dataloader|"
    "hub|push|ddp|torchdynamo|torch_compile|skip_memory|include)_.*|_.*|.*process_group.*|"
    "fed_(clients|options|driver|eval_.*|client_(timeout|retries)|parallel_clients|min_clients)"
)


def settings_of(
    specs: Sequence[ClientSpec],
    datasets: Sequence[Sequence],
    arguments: Sequence,
    options: dict,
    initial: state.State,
) -> dict:
    """The settings of a run, JSON types only.

    Args:
        specs: the clients, with a data set for each in `datasets`.
        arguments: the command line as (Model, Data, Training, Fed)Arguments.
        options: the method's.
        initial: the state that the first round starts from.
    """
    settings = {
        f"--{field.name}": str(getattr(args, field.name))
        for args in arguments
        for field in dataclasses.fields(args)
        if not FREE.fullmatch(field.name)
    }
    settings["--fed_options"] = {k: str(v) for k, v in options.items()}
    settings["the state to start from"] = state.fingerprint(initial)
    settings["the clients"] = [
        {
            "name": spec.name,
            "samples": len(dataset),
            "data": hashlib.sha256(Path(spec.data_path).read_bytes()).hexdigest()[:16],
            "overrides": spec.overrides,
            "from_round": spec.from_round,
            "task": spec.task,
            "command": spec.process.command,
        }
        for spec, dataset in zip(specs, datasets, strict=True)
    ]
    settings["processes"] = arguments[2].world_size
    return settings
