"""The server that sites connect to: `python -m fed.remote.server kits/HOST`.

It stays up for any number of runs, which are started beside it on the same machine. It stops with
Ctrl-C, SIGTERM or SIGKILL alike: what counts is in the runs' folders.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from fed.remote.flare import check_installed, warn_of_end
from fed.remote.flare_process import run_flare
from fed.remote.policy import check_kit, server_resources
from llava.atomic import write_text
from llava.errors import InputError, one_clear_error
from llava.folder_lock import Lock


def serve(folder: Path) -> None:
    """Be the server of a kit; its policy is written anew, for the kit may have been moved."""
    check_installed()
    resources = folder / "local" / "resources.json"
    if resources.is_file():
        write_text(resources, json.dumps(server_resources(folder), indent=1))
    kit = check_kit(folder, "server")
    warn_of_end(kit)
    Lock(kit.folder, f"{folder}: this server is up already")
    port = int(kit.server.rpartition(":")[2])
    _check_free(port)
    log = kit.folder / "console.log"
    print(f"server {kit.name}: listening at port {port}; log: {log}; Ctrl-C ends it", flush=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for stream in (1, 2):
        os.dup2(file, stream)
    for number in (signal.SIGINT, signal.SIGTERM):  # FLARE's threads would outlive an exception
        signal.signal(number, lambda number, frame: os._exit(128 + number))
    run_flare("server", kit)


def _check_free(port: int) -> None:
    with contextlib.closing(socket.socket()) as test:
        test.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            test.bind(("", port))
        except OSError as error:
            raise InputError(f"port {port} cannot be listened at: {error.strerror}") from None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fed.remote.server", description=__doc__.splitlines()[0]
    )
    parser.add_argument("kit", type=Path, help="the server's kit, as kits/fed.example.org")
    args = parser.parse_args(argv)
    with one_clear_error():
        serve(args.kit)


if __name__ == "__main__":
    main()
    sys.exit(0)
