"""The settings that decide a federated run's result: of training, the clients, and the method."""

from __future__ import annotations

from typing import Any

from fed import state
from fed.arguments import FedArguments, declared, own_flags
from fed.drivers.driver import Driver, Run
from llava.train.settings import DECIDING, deciding_flags, fingerprint, training_settings


def settings_of(run: Run, driver: Driver) -> dict[str, Any]:
    """The settings of a run, JSON types only."""
    of_method = {field.name for field in own_flags(run.method)}
    settings = training_settings(*run.arguments[:3])
    deciding = FedArguments.DECIDING.union(*declared(driver.flags or object, "DECIDING"), of_method)
    settings |= deciding_flags([run.arguments.fed], deciding)
    settings["--fed_options"] = {name: str(value) for name, value in run.options.items()}
    settings["the state to start from"] = state.fingerprint(driver.initial)
    settings["the clients"] = [
        {
            "name": spec.name,
            "samples": len(dataset),
            "data": fingerprint(spec.data_path),
            "overrides": {k: v for k, v in spec.overrides.items() if k in DECIDING},
            "from_round": spec.from_round,
            "task": spec.task,
            **driver.settings_of(spec),
        }
        for spec, dataset in zip(run.specs, driver.datasets, strict=True)
    ]
    return settings
