"""The file of tensors that goes with a request: a state, and what is sent beside it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fed.clients.tensor_file import load_with_facts, save_with_facts
from fed.remote.spool import STATE, Spool, check_digest, digest
from fed.remote.ticket import Ticket
from fed.state import State
from llava.atomic import own_name
from llava.errors import InputError


class Sender:
    """Asks sites, each with a state; one that is sent to many sites is written and hashed once."""

    def __init__(self) -> None:
        self._tensors: State = {}
        self._file: Path | None = None
        self._said: dict[str, Any] = {}

    def ask(
        self,
        spool: Spool,
        state: State,
        extras: State,
        make_ticket: Callable[..., Ticket],
    ) -> str:
        """Place a request; returns its key.

        Args:
            make_ticket: gives the ticket, called with `state`: what `digest` says of the file.
        """
        file = own_name(spool.folder / "state")
        tensors = {f"state/{name}": tensor for name, tensor in state.items()}
        tensors |= {f"extras/{name}": tensor for name, tensor in extras.items()}
        if not (self._is_last(tensors) and self._file and _copied(self._file, file)):
            save_with_facts(tensors, {}, file)
            self._said = digest(file)
        key = spool.ask(make_ticket(state=self._said).as_json(), file)
        self._tensors, self._file = tensors, spool.file(key, STATE)
        return key

    def _is_last(self, tensors: State) -> bool:
        return tensors.keys() == self._tensors.keys() and all(
            tensor is self._tensors[name] for name, tensor in tensors.items()
        )


def _copied(source: Path, file: Path) -> bool:
    """Make `file` another name of `source`, or a copy; False if `source` has been taken back."""
    file.unlink(missing_ok=True)
    try:
        os.link(source, file)
    except FileNotFoundError:
        return False
    except OSError:  # a file system without links
        shutil.copyfile(source, file)
    return True


def read_state(spool: Spool, key: str, ticket: Ticket) -> tuple[State, State]:
    """The state of a request, and what is beside it; `InputError` if it came damaged."""
    file = spool.file(key, STATE)
    check_digest(file, ticket.state or {}, "what was sent")
    tensors, _ = load_with_facts(file)
    parts: dict[str, State] = {"state": {}, "extras": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        if part not in parts or not rest:
            raise InputError(f"{file}: tensor {name} is not expected")
        parts[part][rest] = tensor
    return parts["state"], parts["extras"]
