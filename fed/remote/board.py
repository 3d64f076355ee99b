"""How the sites are, for the terminal and for OUTPUT/fed/sites.json."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from fed.remote.courier import CONNECTED
from llava.atomic import atomic_write

STEPS_EVERY = 10.0  # seconds between two lines about the steps of one site
WAITING, AT_WORK = "waiting", "at work"


class Board:
    """Prints a line when a site's state changes, and keeps the file of them all."""

    def __init__(self, file: Path, sites: list[str]):
        self.file = file
        self._rows: dict[str, dict[str, Any]] = {
            site: {"state": "", "since": _now()} for site in sites
        }
        self._spoken = dict.fromkeys(sites, -math.inf)
        self._written = ""

    def show(
        self,
        carried: Mapping[str, str],
        asked: Mapping[str, str],
        progress: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Take in how the sites are.

        Args:
            carried: the courier's word on each site.
            asked: what the sites are asked for, such as `round 2`.
            progress: {step, steps, loss} of those that are at work.
        """
        for site, row in self._rows.items():
            state = self._state(carried[site], site in asked, progress.get(site, {}))
            fresh: dict[str, Any] = {"state": state, "since": row["since"]}
            fresh["asked"] = asked.get(site)
            fresh |= {k: v for k, v in progress.get(site, {}).items() if state == AT_WORK}
            if state != row["state"]:
                fresh["since"] = _now()
                if {state, row["state"]} != {CONNECTED, WAITING}:  # of each message of a sum
                    self._say(site, fresh)
            elif fresh != row and time.monotonic() - self._spoken[site] > STEPS_EVERY:
                self._say(site, fresh)
            self._rows[site] = fresh
        text = json.dumps(self._rows, indent=1)
        if text != self._written:
            self._written = text
            with atomic_write(self.file, sync=False) as file:
                file.write(text.encode())

    def _state(self, carried: str, asked: bool, progress: Mapping[str, Any]) -> str:
        if carried != CONNECTED:
            return carried
        if not asked:
            return WAITING
        return AT_WORK if progress else CONNECTED

    def _say(self, site: str, row: Mapping[str, Any]) -> None:
        self._spoken[site] = time.monotonic()
        text = row["state"]
        if text == AT_WORK:
            text += f" on {row['asked']}: step {row.get('step')}/{row.get('steps')}"
            if isinstance(row.get("loss"), float):
                text += f" loss {row['loss']:.4f}"
        elif text not in (CONNECTED, WAITING):
            text += f", since {row['since'][11:]}"
        print(f"site {site}: {text}", flush=True)


def _now() -> str:
    return datetime.now().isoformat(" ", "seconds")
