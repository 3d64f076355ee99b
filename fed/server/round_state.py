"""What a run has on its disk: the state after a round, and the updates of the round under way."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from fed.state import State
from llava.atomic import atomic_write
from llava.errors import InputError


@dataclass
class Update:
    """What a client sends back: its state (float32), how many samples it saw, what it measured.

    `extras` travels beside the state, `kept` is for the client's own next turn, as the method's
    client rule says.
    """

    state: State
    num_samples: int
    metrics: dict = field(default_factory=dict)
    extras: State = field(default_factory=dict)
    kept: State = field(default_factory=dict)


@dataclass
class RoundState:
    """All that the next round needs, in one file.

    `shared` is the state that clients start from; `personal` has those of clients whose method
    gives each its own, and `kept` what a client keeps from turn to turn. Who takes part in a round
    and which samples it sees follow from the seed and the round's number, so they need no place
    here.
    """

    round: int
    shared: State
    personal: dict[str, State] = field(default_factory=dict)
    memory: State = field(default_factory=dict)
    records: list[dict] = field(default_factory=list)
    settings: dict = field(default_factory=dict)
    kept: dict[str, State] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        tensors = {f"shared/{name}": t for name, t in self.shared.items()}
        tensors |= {f"memory/{name}": t for name, t in self.memory.items()}
        for part in ("personal", "kept"):
            for client, state in getattr(self, part).items():
                tensors |= {f"{part}/{client}/{name}": t for name, t in state.items()}
        facts = {"round": self.round, "records": self.records, "settings": self.settings}
        _save_with_facts(tensors, facts, path)

    @classmethod
    def load(cls, path: Path) -> RoundState:
        tensors, facts = _load_with_facts(path)
        loaded = cls(shared={}, **facts)
        for key, tensor in tensors.items():
            part, name = key.split("/", 1)
            if part in ("personal", "kept"):
                client, name = name.split("/", 1)
                getattr(loaded, part).setdefault(client, {})[name] = tensor
            else:
                getattr(loaded, part)[name] = tensor
        return loaded


def _save_with_facts(tensors: State, facts: dict, path: Path) -> None:
    from safetensors.torch import save

    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    with atomic_write(path) as file:
        file.write(save(tensors, metadata={"facts": json.dumps(facts)}))


def _load_with_facts(path: Path) -> tuple[State, dict]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a file of this run ({error})") from None


def save_update(update: Update, path: Path) -> None:
    tensors = {
        f"{part}/{name}": tensor
        for part in ("state", "extras", "kept")
        for name, tensor in getattr(update, part).items()
    }
    facts = {"num_samples": update.num_samples, "metrics": update.metrics}
    _save_with_facts(tensors, facts, path)


def load_update(path: Path) -> Update:
    tensors, facts = _load_with_facts(path)
    update = Update({}, **facts)
    for key, tensor in tensors.items():
        part, name = key.split("/", 1)
        getattr(update, part)[name] = tensor
    return update
