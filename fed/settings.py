"""What decides the result of a federated run: that of training, the clients', and the method's."""

from __future__ import annotations

from collections.abc import Sequence

from fed import state
from fed.clients import ClientSpec
from llava.train.settings import DECIDING, deciding_flags, fingerprint, training_settings

FED_DECIDING = frozenset(
    "fed_rounds fed_method pilot_stage1_learning_rate fed_clients_per_round fed_one_pass "
    "fed_lr_schedule fed_pool fed_client_command".split()
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
    settings = training_settings(*arguments[:3]) | deciding_flags(arguments[3:], FED_DECIDING)
    settings["--fed_options"] = {k: str(v) for k, v in options.items()}
    settings["the state to start from"] = state.fingerprint(initial)
    settings["the clients"] = [
        {
            "name": spec.name,
            "samples": len(dataset),
            "data": fingerprint(spec.data_path),
            "overrides": {k: v for k, v in spec.overrides.items() if k in DECIDING},
            "from_round": spec.from_round,
            "task": spec.task,
            "command": spec.process.command,
        }
        for spec, dataset in zip(specs, datasets, strict=True)
    ]
    return settings
