"""The update of a client: what it sends back after its task, in memory and on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fed.clients.tensor_file import load_with_facts, save_with_facts
from fed.state import State


@dataclass
class Update:
    """A client's state (float32), its number of samples, and its measures, as it sends them back.

    `extras` travels beside the state, `kept` is for the client's own next task, as the method's
    client rule says.
    """

    state: State
    num_samples: int
    metrics: dict = field(default_factory=dict)
    extras: State = field(default_factory=dict)
    kept: State = field(default_factory=dict)


def save_update(update: Update, path: Path) -> None:
    tensors = {
        f"{part}/{name}": tensor
        for part in ("state", "extras", "kept")
        for name, tensor in getattr(update, part).items()
    }
    facts = {"num_samples": update.num_samples, "metrics": update.metrics}
    save_with_facts(tensors, facts, path)


def load_update(path: Path, check: bool = True) -> Update:
    """The update in a file, its tensors mapped; `check` as `load_with_facts` has it."""
    tensors, facts = load_with_facts(path, check)
    update = Update({}, **facts)
    for key, tensor in tensors.items():
        part, name = key.split("/", 1)
        getattr(update, part)[name] = tensor
    return update
