"""The state of the server after a round: all that the next round needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fed.clients.tensor_file import load_with_facts, save_with_facts
from fed.server.client_states import ClientStates
from fed.state import State
from llava.errors import InputError

STATE_FILE = "state.safetensors"


@dataclass
class RoundState:
    """All that the next round needs.

    `shared`, the state that clients start from, and the method's `memory` are in one file, with the
    facts about the rest; what belongs to one client is in files of its own: `personal` has the
    states of clients whose method gives each its own, and `kept` what a client keeps from turn to
    turn. The run has finished a round when the one file is renamed. Who takes part in a round and
    which samples it sees follow from the seed and the round's number, so they need no place here.

    Attributes:
        last: by client the last round in which its update counted.
        explained: by client the sums of `fed.server.reliability`.
        records: the mark of `fed.server.records`.
    """

    round: int
    shared: State
    personal: ClientStates
    kept: ClientStates
    memory: State = field(default_factory=dict)
    settings: dict = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)
    explained: dict[str, list[float]] = field(default_factory=dict)
    records: Mapping[str, int | str] = field(default_factory=dict)

    @classmethod
    def first(
        cls,
        folder: Path,
        shared: State,
        settings: Mapping[str, Any],
        records: Mapping[str, int | str],
    ) -> RoundState:
        """That before the first round."""
        personal, kept = _client_states(folder, {}, {})
        return cls(0, shared, personal, kept, settings=dict(settings), records=records)

    def save(self, folder: Path) -> None:
        """Write it; the clients' own files are there."""
        tensors = {f"shared/{name}": t for name, t in self.shared.items()}
        tensors |= {f"memory/{name}": t for name, t in self.memory.items()}
        facts = {
            "round": self.round,
            "settings": self.settings,
            "last": self.last,
            "explained": self.explained,
            "records": dict(self.records),
            "personal": self.personal.rounds,
            "kept": self.kept.rounds,
        }
        save_with_facts(tensors, facts, folder / STATE_FILE)

    @classmethod
    def load(cls, folder: Path, check: bool = True) -> RoundState:
        """The state in a folder, its tensors mapped; `check` as `load_with_facts` has it."""
        path = folder / STATE_FILE
        tensors, facts = load_with_facts(path, check)
        parts: dict[str, Any] = {"shared": {}, "memory": {}}
        try:
            personal, kept = _client_states(folder, facts.pop("personal"), facts.pop("kept"))
            for key, tensor in tensors.items():
                part, name = key.split("/", 1)
                parts[part][name] = tensor
            return cls(**parts, **facts, personal=personal, kept=kept)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not the state of a run ({error!r})") from None


def _client_states(folder: Path, *rounds: Mapping[str, int]) -> list[ClientStates]:
    return [
        ClientStates(folder / name, of)
        for name, of in zip(("personal", "kept"), rounds, strict=True)
    ]
