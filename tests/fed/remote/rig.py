"""Server, sites and driver as processes on this machine, to be killed; and a line to be cut.

`python -m tests.fed.remote.rig NAME FOLDER` is a site that connects and trains nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from fed.remote import flare

ROOT = Path(__file__).parents[3]
SITES = ("a", "b")
SECONDS = 600.0  # that anything may take before a test gives up


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Rig:
    """The processes by name: `server`, `driver`, and the sites'.

    Args:
        folder: gets everything; `kits` are there already.

    Attributes:
        commands: the words after `python -m` of each name; a site that has none is an idle one.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.commands = {"server": ["fed.remote.server", str(folder / "kits" / "localhost")]}
        self.processes: dict[str, subprocess.Popen] = {}

    def start(self, name: str) -> None:
        idle = ["tests.fed.remote.rig", name, str(self.folder)]
        self.launch(name, *self.commands.get(name, idle))

    def launch(self, name: str, *words: str) -> None:
        """Start `python -m WORDS` under a name."""
        with open(self.folder / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-u", "-m", *words],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Kill the one process; what it has started ends by itself."""
        self.processes[name].send_signal(number)
        self.processes.pop(name).wait()

    def job(self, kit: str) -> int | None:
        """The number of a job's process at the server (localhost) or at a site."""
        for pid, command in commands(str(self.folder / "kits" / kit)):
            if "worker_process" in command or "runner_process" in command:
                return pid
        return None

    def done(self) -> bool:
        return self.processes["driver"].poll() == 0

    def wait(self, happened: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not happened():
            for name, process in self.processes.items():
                if process.poll() not in (None, 0):
                    raise AssertionError(f"{name} has ended\n{self.logs()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"not in {SECONDS} s: {what}\n{self.logs()}")
            time.sleep(0.1)

    def logs(self) -> str:
        names = ("*.log", "*/flare.log", "*/fed/spool/.watch.log", "kits/*/console.log")
        files = [file for name in names for file in self.folder.glob(name)]
        return "\n".join(f"== {f}\n{f.read_text(errors='replace')[-2000:]}" for f in files)

    def close(self) -> None:
        """End all, and check that nothing of it is left within five seconds."""
        for name in list(self.processes):
            self.processes[name].terminate()
        for name in list(self.processes):
            try:
                self.processes.pop(name).wait(120)
            except subprocess.TimeoutExpired:
                raise AssertionError(f"{name} does not end\n{self.logs()}") from None
        deadline = time.monotonic() + 5
        while left := commands(str(self.folder)):
            if time.monotonic() > deadline:
                for pid, _ in left:
                    os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"left at work: {left}")
            time.sleep(0.1)


def change(path: Path, edit) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def listen_at(folder: Path, port: int) -> None:
    """Change the port in all kits."""
    target = f"localhost:{port}"

    def server(values):
        values["servers"][0]["service"]["target"] = target
        values["servers"][0]["admin_port"] = port

    change(folder / "localhost/startup/fed_server.json", server)
    change(folder / "admin/startup/fed_admin.json", lambda v: v["admin"].update(port=port))
    for site in SITES:
        connect_to(folder, site, port)


def connect_to(folder: Path, site: str, port: int) -> None:
    change(
        folder / site / "startup/fed_client.json",
        lambda v: v["servers"][0]["service"].update(target=f"localhost:{port}"),
    )


def commands(text: str) -> list[tuple[int, str]]:
    """The processes, but this one, whose command line has a text in it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if text in command and int(folder.name) != os.getpid():
                found.append((int(folder.name), command))
    return found


class Line:
    """A TCP relay on this machine from `port`, to be cut: `closed`, or `silent` as a dead router.

    Args:
        target: the port that it relays to.
    """

    def __init__(self, target: int):
        self.target, self.state, self.carried = target, "open", 0
        self.cut_at: int | None = None  # the number of bytes carried at which it is closed
        self._pairs: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, state: str) -> None:
        self.state = state
        if state == "closed":
            for end in list(self._pairs):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self.state, self.cut_at = "open", None

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self.state == "closed":
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self.target), 5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            self._pairs |= {near, far}
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(2**16):
                while self.state == "silent":
                    time.sleep(0.1)
                other.sendall(data)
                self.carried += len(data)
                if self.cut_at is not None and self.carried >= self.cut_at:
                    self.cut_at = None
                    self.cut("closed")
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            self._pairs.discard(end)

    def close(self) -> None:
        self._listener.close()
        self.cut("closed")


def be_idle(name: str, folder: Path) -> None:
    config = SimpleNamespace(
        name=name, kit=folder / "kits" / name, work=folder / name, source=Path("site.yaml")
    )
    config.work.mkdir(exist_ok=True)
    courier = flare.SiteSide(config)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        while True:
            courier.keep_up()
            time.sleep(0.1)
    finally:
        courier.close()


if __name__ == "__main__":
    be_idle(sys.argv[1], Path(sys.argv[2]))
