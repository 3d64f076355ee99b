"""FLARE's own long-running processes, tied to ours: `python -m fed.remote.flare_process KIND KIT`.

FLARE starts its jobs in sessions of their own and lets them find out by themselves that it is gone,
which takes half a minute. Here each process ends within a second of its parent; nothing is lost by
that, for what counts is on the disk.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import sys
import threading
import time
from pathlib import Path

from fed.remote.policy import Kit, check_kit

_MODULES = {
    "client": "nvflare.private.fed.app.client.client_train",
    "server": "nvflare.private.fed.app.server.server_train",
}
_JOB = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def end_with_parent() -> None:
    """End this process, at once, when the one that started it has ended."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.3)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_flare(kind: str, kit: Kit) -> None:
    """Be the FLARE client or server of a kit, until it ends."""
    remove_jobs(kit.folder)
    own = [f"uid={kit.name}"] if kind == "client" else []
    organisation = f"org={kit.certificate.organisation}"
    sys.argv = [
        *(_MODULES[kind], "-m", str(kit.folder), "-s", f"fed_{kind}.json"),
        *("--set", "secure_train=true", *own, organisation, "config_folder=config"),
    ]
    # Where each thread has an arena of its own, freed memory does not go back.
    os.environ.setdefault("MALLOC_ARENA_MAX", "4")
    (kit.folder / "transfer").mkdir(exist_ok=True)
    runpy.run_module(_MODULES[kind], run_name="__main__", alter_sys=True)


def remove_jobs(kit: Path) -> None:
    """Remove what killed jobs have left in a kit: configurations and logs."""
    for folder in kit.iterdir():
        if _JOB.fullmatch(folder.name):
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    end_with_parent()
    run_flare("client", check_kit(sys.argv[2], "site"))
