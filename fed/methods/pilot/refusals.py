"""What is refused of the connector's flags, wherever a run sets them itself."""

from __future__ import annotations

from typing import Any

from llava.errors import InputError


def refuse_own_tasks(model: Any, who: str, why: str) -> None:
    """Refuse the connector's flags that a run sets itself."""
    for flag in ("pilot_tasks", "pilot_stage"):
        if getattr(model, flag) != getattr(type(model)(), flag):
            raise InputError(f"--{flag} has no place with {who}: {why}")
