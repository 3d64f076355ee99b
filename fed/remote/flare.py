"""The courier between machines, on NVIDIA FLARE: a long-running server, and a job for each site.

FLARE brings mutual TLS, names that certificates prove, and each site's own policy. It knows no
rounds and no tensors: a job copies files between two spools (`fed.remote.exchange`), and any of its
processes may be killed at any moment. A job's status at the server is not believed: a job that is
at work holds a lock and tells when it last heard its site, and one that hears nothing ends itself.

    driver ── watch ──admin──┐                   ┌── FLARE client ── `fed.site`
      └ OUTPUT/fed/spool ── job at the server ══ job at the site ── WORK/spool

This module imports no FLARE: its processes are apart, `fed.remote.flare_watch` for the driver and
`fed.remote.flare_process` for the server and the sites, and end with whoever started them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from fed.remote.certificate import INSTALL
from fed.remote.courier import AWAY, CONNECTED, CONNECTING, Courier, RemoteFlags, SiteCourier
from fed.remote.policy import Kit, check_kit
from fed.remote.spool import Spool
from llava.errors import InputError
from llava.folder_lock import Lock, is_held
from llava.json_files import read_json

if TYPE_CHECKING:
    from fed.remote.site_yaml import SiteConfig

SPOOL_VARIABLE = "FEDLLAVA_SPOOL"
"""Tells the job at a site where the site's spools are; the server has no say in it."""

HEARD, WATCH, END, REPORT = ".heard", ".watch.json", ".end", ".courier.json"
STARTING = "its job is starting"  # what the watch says of a site whose job it has sent
SILENCE = 10.0  # seconds after which a site that says nothing is away
RUN = re.compile("[0-9a-f]{32}")

_STUCK = 90.0  # seconds without a word from the watch after which it is started again
_SOON_ENDED = 30  # days
# Seconds to the next try of a site that was refused. One that was killed has its place again when
# the server has not heard of it for a while; any other one disturbs, by trying, who has the place.
_SOON, _LATER = 5.0, 300.0
_TRIED = 20.0  # seconds that it tries soon


class DriverSide(Courier):
    """Has a process watch over the sites' jobs while one of them is silent."""

    def __init__(self, spool: Path, sites: Sequence[str], flags: RemoteFlags):
        super().__init__(spool, sites, flags)
        if not flags.fed_remote_kit:
            raise InputError("--fed_courier flare needs --fed_remote_kit, the admin's kit")
        check_installed()
        self.kit = check_kit(flags.fed_remote_kit, "admin")
        warn_of_end(self.kit)
        for site in sites:
            if not re.fullmatch("[A-Za-z0-9_-]+", site):
                raise InputError(
                    f"client {site}: a site's name has letters, digits, '_' and '-' alone"
                )
        spool.mkdir(parents=True, exist_ok=True)
        for name in (END, WATCH):
            (spool / name).unlink(missing_ok=True)
        self._watch: subprocess.Popen | None = None
        self._began = 0.0

    def keep_up(self) -> None:
        if self._watch is not None and self._watch.poll() is not None:
            self._watch = None
        if self._watch is not None:
            if time.time() - max(self._began, changed(self.spool / WATCH)) > _STUCK:
                self._watch.kill()
            return
        if all(heard(self.spool / site) for site in self.sites):
            return
        kit, spool = str(self.kit.folder), str(self.spool.absolute())
        enough = str(self.flags.fed_job_gb * 1e9)
        command = ["fed.remote.flare_watch", kit, self.kit.name, spool, enough]
        with open(self.spool / ".watch.log", "ab") as log:
            self._watch = _start([*command, *self.sites], log)
        self._began = time.time()

    def status(self) -> dict[str, str]:
        told: dict[str, str] = {}
        if self._watch is not None and changed(self.spool / WATCH) > self._began:
            with contextlib.suppress(InputError):
                told = read_json(self.spool / WATCH)

        def of(site: str) -> str:
            if heard(self.spool / site):
                return CONNECTED
            if told.get(site, STARTING) == STARTING:
                return CONNECTING
            return f"{AWAY}: {told[site]}"

        return {site: of(site) for site in self.sites}

    def close(self) -> None:
        """End the watch and the jobs; what they have not carried yet, the next ones will."""
        (self.spool / END).touch()
        _stop(self._watch)
        self._watch = None


class SiteSide(SiteCourier):
    """Runs the FLARE client of the site's kit, whose jobs fill the spools under WORK/spool."""

    def __init__(self, config: SiteConfig):
        super().__init__(config)
        if config.kit is None:
            raise InputError(f"{config.source}: courier flare needs kit, the folder of this site")
        check_installed()
        self.kit = check_kit(config.kit, "site")
        if self.kit.name != config.name:
            raise InputError(
                f"{config.source}: name is {config.name}, but the kit {config.kit} is that of "
                f"{self.kit.name}"
            )
        warn_of_end(self.kit)
        self.root = config.work / "spool"
        self.root.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(self.kit.folder, f"{config.source}: another process uses {config.kit}")
        self._client: subprocess.Popen | None = None
        self._log = config.work / "flare.log"
        self._next_start = self._next_look = self._since = 0.0
        self._refused = self._said = ""

    def spools(self) -> list[Spool]:
        folders = sorted(path for path in self.root.iterdir() if RUN.fullmatch(path.name))
        return [Spool(folder, self.config.name) for folder in folders]

    def keep_up(self) -> None:
        now = time.monotonic()
        if self._client is not None and self._client.poll() is not None:
            self._client = None
            before, self._refused = self._refused, _refusal(_ends_of(self._log))
            if self._refused:
                self._since = self._since if before else now
                self._next_start = now + (_SOON if now - self._since < _TRIED else _LATER)
        if self._client is None and now >= self._next_start:
            self._next_start = now + 5
            with open(self._log, "wb") as log:
                variables = {SPOOL_VARIABLE: str(self.root)}
                self._client = _start(
                    ["fed.remote.flare_process", "client", self.kit.folder], log, variables
                )
        if now >= self._next_look:
            self._next_look = now + 5
            self._say(self._trouble())

    def close(self) -> None:
        _stop(self._client)
        self._client = None
        self._lock.release()

    def _trouble(self) -> str:
        """What keeps files from being carried, as far as this side knows; else nothing."""
        report: dict = {}
        with contextlib.suppress(InputError):
            report = read_json(self.root / REPORT)
        if time.time() - changed(self.root / REPORT) < 2 * SILENCE:
            return str(report.get("error", ""))
        if self._client is not None:
            log = _ends_of(self._log)
            if "Successfully registered client" in log:
                self._refused = ""
            if "Failed to send heartbeat" in log.rstrip().rpartition("\n")[2]:
                self._client.kill()  # withdrawn while connected: the next one is told so
        return no_answer(self.kit.server) or self._refused

    def _say(self, trouble: str) -> None:
        if trouble != self._said:
            print(f"site {self.config.name}: {trouble or 'connected again'}", flush=True)
            self._said = trouble


def check_installed() -> None:
    """`InputError` where the extra `remote` is not installed."""
    if importlib.util.find_spec("nvflare") is None:
        raise InputError(f"sites on other machines need {INSTALL}")


def warn_of_end(kit: Kit) -> None:
    """Say that a certificate ends soon."""
    if (days := kit.certificate.days_left()) < _SOON_ENDED:
        print(
            f"warning: {kit.folder}: the certificate of {kit.name} ends in {days} days, on "
            f"{kit.certificate.ends:%Y-%m-%d}; python -m fed.remote.kits --renew makes a new one",
            flush=True,
        )


def run_of(spool: Path) -> str:
    """The name, 32 hex digits, that a driver's folder of spools has at the sites."""
    return hashlib.sha256(f"{socket.gethostname()}\0{spool.absolute()}".encode()).hexdigest()[:32]


def heard(spool: Path) -> bool:
    """Whether the job of a site's spool is at work and has heard the site just now."""
    return time.time() - changed(spool / HEARD) < SILENCE and is_held(spool)


def no_answer(server: str) -> str:
    """That a server does not answer, and why; empty where it does."""
    host, _, port = server.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=3).close()
    except OSError as error:
        return f"no answer from the server {server} ({error.strerror or error}); trying on"
    return ""


def changed(path: Path) -> float:
    """When a file was last written; 0 where there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _ends_of(log: Path) -> str:
    """The beginning of a log, with its registration, and its end."""
    with open(log, "rb") as file:
        found = file.read(2**16)
        file.seek(max(len(found), os.path.getsize(log) - 1000))
        return (found + file.read()).decode(errors="replace")


def _refusal(log: str) -> str:
    """Why the server has refused a site, by the log of its FLARE client; else nothing."""
    if re.search("registration rejected: Client '.*' is disabled", log):
        return "the coordinator has withdrawn this site; the server refuses it"
    if "registration rejected: register_client unauthenticated" in log:
        return "another process with this kit is, or was just now, at the server; this one waits"
    return ""


def _start(
    words: Sequence[str | Path], log: IO[bytes], variables: dict[str, str] | None = None
) -> subprocess.Popen:
    """A module of ours as a process, which ends when this one does.

    It is its own session, so that Ctrl-C in a terminal is for this process to act on.
    """
    return subprocess.Popen(
        [sys.executable, "-u", "-m", *map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, **(variables or {})},
        start_new_session=True,
    )


def _stop(process: subprocess.Popen | None) -> None:
    if process is None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
