"""A site's answer to a task, kept until the next one: handed over again, and never trained again.

Hours of training may end at a network that is away, or a driver that was killed. Where records are
private a second training would even be a second look at them, whose noise on other kernels is not
quite the first's.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fed.clients.update import Update, load_update, save_update
from fed.methods.interface.checks import check_not_zero
from fed.remote.site_yaml import SiteConfig
from fed.remote.ticket import Ticket, deciding, digest_of
from fed.state import State, is_finite
from llava.atomic import own_name
from llava.errors import InputError

_NAMES = "answer-*.safetensors"


class KeptAnswer:
    """The place of the answer to one request.

    A request that asks for the same has the same place, whatever its nonce; so has one under other
    flags that decide nothing. What a site says of itself in site.yaml decides, too.

    Args:
        folder: the run's, within the site's work folder.
    """

    def __init__(self, folder: Path, ticket: Ticket, config: SiteConfig):
        asked = ticket.as_json() | {"nonce": ""}
        asked |= {part: deciding(asked[part]) for part in ("flags", "own")}
        own = {"process": str(config.process), "flags": config.flags}
        self.folder = folder
        self.file = folder / f"answer-{digest_of(asked | {'site.yaml': own})[:32]}.safetensors"

    def is_there(self) -> bool:
        """Whether it was given before, and is whole."""
        if not self.file.exists():
            return False
        try:
            load_update(self.file)
        except InputError:
            return False
        return True

    def keep(self, update: Update, good: bool) -> None:
        """Keep an answer in the place of earlier ones.

        Args:
            good: whether it is to be given again: where the driver will refuse it, another try may
                do better.
        """
        forget_answers(self.folder)
        if not good:
            self.file = self.folder / "answer-refused.safetensors"
        save_update(update, self.file)

    def second(self, spool: Path) -> Path:
        """A second file of the same content, in a spool's folder."""
        file = own_name(spool / "update")
        file.unlink(missing_ok=True)
        try:
            os.link(self.file, file)
        except OSError:  # another disk, or one without links
            shutil.copyfile(self.file, file)
        return file


def is_good(update: Update, base: State, told: Mapping[str, Any]) -> bool:
    """Whether nothing is to be seen in an update for which a driver refuses it.

    Args:
        base: the state that the task began with.
        told: the measures that go with it.
    """
    tensors = [*update.state.values(), *update.extras.values()]
    if not all(is_finite(tensor) for tensor in tensors):
        return False
    try:
        check_not_zero(update.state, base, "the update")
    except InputError:
        return False
    return all(
        isinstance(value, (dict, list)) or (value is not None and math.isfinite(value))
        for value in told.values()
    )


def forget_answers(folder: Path) -> None:
    """Remove what is kept."""
    for file in folder.glob(_NAMES):
        file.unlink()
