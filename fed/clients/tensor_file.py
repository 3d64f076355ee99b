"""A file of the run's own: tensors, and facts about them as JSON in its head."""

from __future__ import annotations

import json
from pathlib import Path

from fed.state import State
from llava.atomic import atomic_write
from llava.errors import InputError


def save_with_facts(tensors: State, facts: dict, path: Path) -> None:
    from safetensors.torch import save

    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    with atomic_write(path) as file:
        file.write(save(tensors, metadata={"facts": json.dumps(facts)}))


def load_with_facts(path: Path) -> tuple[State, dict]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a file of this run ({error})") from None
