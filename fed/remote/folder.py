"""The courier of one folder that driver and sites see: a cluster's file system, or one machine.

Nothing is carried: a site works in OUTPUT/fed/spool/NAME itself. It holds a lock there, and writes
`alive` every second or so; that file's changes tell the driver that the site is there, whatever
the two clocks say.
"""

from __future__ import annotations

import contextlib
import glob
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from fed.remote.courier import AWAY, CONNECTED, Courier, RemoteFlags, SiteCourier
from fed.remote.site_yaml import SiteConfig
from fed.remote.spool import Spool
from llava.folder_lock import Lock
from llava.processes import name_of

ALIVE = "alive"
SILENT_FOR = 15.0  # seconds without a change of `alive` after which a site is away


class DriverSide(Courier):
    """Knows a site's presence by its file `alive`."""

    def __init__(self, spool: Path, sites: Sequence[str], flags: RemoteFlags):
        super().__init__(spool, sites, flags)
        self._last: dict[str, int] = {}  # when the file was changed, by the site's clock
        self._seen: dict[str, float] = {}  # when that was seen, by ours

    def keep_up(self) -> None:
        for site in self.sites:
            try:
                changed = (self.spool / site / ALIVE).stat().st_mtime_ns
            except OSError:
                continue
            if site in self._last and changed != self._last[site]:
                self._seen[site] = time.monotonic()
            self._last[site] = changed

    def status(self) -> dict[str, str]:
        now = time.monotonic()
        return {
            site: CONNECTED if now - self._seen.get(site, -SILENT_FOR) < SILENT_FOR else AWAY
            for site in self.sites
        }

    def close(self) -> None:
        pass


class SiteSide(SiteCourier):
    """Finds the spools of its name under `folder`, in which `*` stands for any run."""

    def __init__(self, config: SiteConfig):
        super().__init__(config)
        self._held: dict[Path, Lock] = {}
        self._mutex = threading.Lock()

    def spools(self) -> list[Spool]:
        """Those there are now; `InputError` where another process of this name works in one."""
        with self._mutex:
            for root in glob.glob(self.config.folder or ""):
                folder = Path(root) / self.config.name
                if folder.is_dir() and folder not in self._held:
                    self._held[folder] = Lock(folder, self._refusal(folder))
            for folder in [folder for folder in self._held if not folder.is_dir()]:
                self._held.pop(folder).release()
            return [Spool(folder, self.config.name) for folder in sorted(self._held)]

    def _refusal(self, folder: Path) -> str:
        return f"{folder}: another site works there under the name {self.config.name}"

    def keep_up(self) -> None:
        with self._mutex:
            for folder in self._held:
                with contextlib.suppress(OSError), open(folder / ALIVE, "w") as file:
                    file.write(name_of())

    def close(self) -> None:
        with self._mutex:
            for folder, lock in self._held.items():
                with contextlib.suppress(OSError):
                    os.unlink(folder / ALIVE)
                lock.release()
            self._held = {}
