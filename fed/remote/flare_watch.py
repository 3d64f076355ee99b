"""The driver's eye on FLARE: sends a site's job, and sends it again when it is gone.

A process of its own, for FLARE's sessions keep threads that outlive a driver. It looks at a site
only while the site's job is silent, and ends when all have been heard for a while.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nvflare.fuel.flare_api.flare_api import new_secure_session

from fed.remote.flare import END, HEARD, STARTING, WATCH, changed, heard, no_answer, run_of
from fed.remote.flare_process import end_with_parent
from fed.remote.policy import SERVER_CLASS, SITE_CLASS, check_kit
from llava.atomic import write_text
from llava.errors import reason
from llava.folder_lock import is_held

_PACE = 2.0  # seconds between two looks
_CALM = 30.0  # seconds without a silent site after which there is nothing to watch
_STARTING = 40.0  # seconds that a job which was sent has to be heard of
_LOGIN = 10.0


class Watch:
    """The jobs of the sites of one run.

    Args:
        kit: the admin's.
        user: the name in its certificate.
        enough: bytes after which a job ends.
    """

    def __init__(self, kit: Path, user: str, spool: Path, enough: float, sites: Sequence[str]):
        self.kit, self.user, self.spool, self.sites = kit, user, spool, sites
        self.enough = enough
        self.server = check_kit(kit, "admin").server
        self._session: Any = None
        self._sent: dict[str, float] = {}

    def run(self) -> None:
        """Look until all is well, or the run has ended."""
        calm_since = time.monotonic()
        while time.monotonic() - calm_since < _CALM and not (self.spool / END).exists():
            silent = [site for site in self.sites if not heard(self.spool / site)]
            if silent:
                calm_since = time.monotonic()
            write_text(self.spool / WATCH, json.dumps(self._look(silent)))
            time.sleep(_PACE)

    def _look(self, silent: Sequence[str]) -> dict[str, str]:
        """Send the jobs that are missing; why each silent site is away."""
        if not silent:
            return {}
        if trouble := no_answer(self.server):
            self._close()
            return dict.fromkeys(silent, trouble)
        try:
            return {site: self._look_at(site) for site in silent}
        except Exception as error:  # whatever FLARE raises, it is asked again
            self._close()
            print(f"{time.ctime()} {type(error).__name__}: {error}", flush=True)
            return dict.fromkeys(silent, f"the server {self.server} says: {reason(error)}")

    def _look_at(self, site: str) -> str:
        sent = self._sent.get(site, 0.0)
        if changed(self.spool / site / HEARD) < sent and time.time() - sent < _STARTING:
            return STARTING
        if is_held(self.spool / site):
            return "it has not been heard for a while"  # the job finds out, and ends
        if self._session is None:
            self._session = new_secure_session(self.user, str(self.kit), timeout=_LOGIN)
        connected = {client.name for client in self._session.get_connected_client_list()}
        if site not in connected:
            return "not connected to the server"
        folder = job_folder(self.spool, site, self.enough)
        self._clear(folder.name)
        self._session.submit_job(str(folder))
        self._sent[site] = time.time()
        return STARTING

    def _clear(self, name: str) -> None:
        """End the jobs of this name, none of which is at work, and delete those that had ended.

        FLARE does not expect that a job goes which it has not seen end.
        """
        for job in self._session.list_jobs(name_prefix=name):
            ended = str(job.get("status", "")).startswith("FINISHED")
            # One that FLARE calls running may be dead since its server was.
            with contextlib.suppress(Exception):
                (self._session.delete_job if ended else self._session.abort_job)(job["job_id"])

    def _close(self) -> None:
        if self._session is not None:
            with contextlib.suppress(Exception):
                self._session.close()
        self._session = None


def job_folder(spool: Path, site: str, enough: float) -> Path:
    """The definition of a site's job, written anew, for FLARE to be sent."""
    run = run_of(spool)
    folder = spool / ".jobs" / f"carry-{run[:12]}-{site}"
    config = folder / "app" / "config"
    config.mkdir(parents=True, exist_ok=True)
    arguments = {"spool": str(spool.absolute()), "site": site, "run": run, "enough": enough}
    meta = {"name": folder.name, "resource_spec": {}, "min_clients": 1, "mandatory_clients": [site],
            "deploy_map": {"app": ["server", site]}}  # fmt: skip
    server = {"format_version": 2, "components": [],
              "workflows": [{"id": "carry", "path": SERVER_CLASS, "args": arguments}]}  # fmt: skip
    executor = {"path": SITE_CLASS, "args": {}}
    client = {"format_version": 2, "components": [],
              "executors": [{"tasks": ["carry"], "executor": executor}]}  # fmt: skip
    for path, value in (
        (folder / "meta.json", meta),
        (config / "config_fed_server.json", server),
        (config / "config_fed_client.json", client),
    ):
        path.write_text(json.dumps(value, indent=1))
    return folder


if __name__ == "__main__":
    end_with_parent()
    kit, user, spool, enough, *sites = sys.argv[1:]
    Watch(Path(kit), user, Path(spool), float(enough), sites).run()
    sys.stdout.flush()
    os._exit(0)  # a session's threads would wait for ever
