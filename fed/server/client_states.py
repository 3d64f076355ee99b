"""What the server keeps of single clients: a file for each, read when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from fed.clients.tensor_file import load_with_facts, save_with_facts
from fed.state import State
from llava.atomic import remove_leftovers
from llava.errors import InputError


class ClientStates(Mapping[str, State]):
    """By client's name its state, mapped from `FOLDER/NAME.ROUND.safetensors`.

    Files of a round are written beside those of the round before, and what names them decides which
    ones are valid: a run may be killed between two of them.

    Args:
        rounds: by name the round in which a client's state was last written.
    """

    def __init__(self, folder: Path, rounds: Mapping[str, int] | None = None):
        self.folder, self.rounds = folder, dict(rounds or {})
        self._checked: set[str] = set()

    def __getitem__(self, name: str) -> State:
        file = self._file(name)
        tensors, facts = load_with_facts(file, check=name not in self._checked)
        expected = {"client": name, "round": self.rounds[name]}
        if facts != expected:
            raise InputError(f"{file}: is of {facts}, expected {expected}")
        self._checked.add(name)
        return tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.rounds)

    def __len__(self) -> int:
        return len(self.rounds)

    def after(self, round: int, names: Iterable[str]) -> ClientStates:
        """The states after a round that changes these clients' (`write`); the others stay."""
        return ClientStates(self.folder, {**self.rounds, **dict.fromkeys(names, round)})

    def write(self, name: str, state: State) -> None:
        """Write a client's state of the round that `rounds` says."""
        save_with_facts(state, {"client": name, "round": self.rounds[name]}, self._file(name))

    def remove_others(self) -> None:
        """Remove the files of other rounds, and what killed writers have left."""
        if not self.folder.is_dir():
            return
        remove_leftovers(self.folder)
        valid = {self._file(name) for name in self.rounds}
        for file in self.folder.glob("*.safetensors"):
            if file not in valid:
                file.unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.{self.rounds[name]:04d}.safetensors"
