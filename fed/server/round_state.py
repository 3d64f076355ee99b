"""The state of the server after a round: all that the next round needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fed.clients.tensor_file import load_with_facts, save_with_facts
from fed.state import State


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
        save_with_facts(tensors, facts, path)

    @classmethod
    def load(cls, path: Path) -> RoundState:
        tensors, facts = load_with_facts(path)
        loaded = cls(shared={}, **facts)
        for key, tensor in tensors.items():
            part, name = key.split("/", 1)
            if part in ("personal", "kept"):
                client, name = name.split("/", 1)
                getattr(loaded, part).setdefault(client, {})[name] = tensor
            else:
                getattr(loaded, part)[name] = tensor
        return loaded
