"""A site's answer to a task, kept until the next one: handed over again, and never trained again.

Hours of training may end at a disk that is full, a network that is away or a driver that was
killed. Where records are private a second training would even be a second look at them, whose
noise on other kernels is not quite the first's.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fed.clients.update import Update, load_update, save_update
from fed.remote.ticket import Ticket, digest_of
from fed.state import is_finite
from llava.atomic import own_name
from llava.errors import InputError

_NAMES = "answer-*.safetensors"


def kept_answer(folder: Path, ticket: Ticket) -> Path | None:
    """The answer that was given to a request like this, if `folder`, the run's, has it whole."""
    file = _file(folder, ticket)
    if not file.exists():
        return None
    try:
        load_update(file)
    except InputError:
        return None
    return file


def keep_answer(folder: Path, ticket: Ticket, update: Update) -> Path:
    """Keep an answer in the place of earlier ones; returns its file.

    One with NaN, which the driver will refuse, is not found again: another try may do better.
    """
    forget_answers(folder)
    file = _file(folder, ticket)
    tensors = [*update.state.values(), *update.extras.values()]
    finite = all(is_finite(tensor) for tensor in tensors)
    file = file if finite else file.with_name("answer-refused.safetensors")
    save_update(update, file)
    return file


def forget_answers(folder: Path) -> None:
    """Remove what is kept."""
    for file in folder.glob(_NAMES):
        file.unlink()


def to_hand_over(file: Path, spool: Path) -> Path:
    """A second file of the same content, in a spool's folder."""
    second = own_name(spool / "update")
    second.unlink(missing_ok=True)
    try:
        os.link(file, second)
    except OSError:  # another disk, or one without links
        shutil.copyfile(file, second)
    return second


def _file(folder: Path, ticket: Ticket) -> Path:
    asked = ticket.as_json() | {"nonce": ""}
    return folder / f"answer-{digest_of(asked)[:32]}.safetensors"
