"""Server, sites and driver as processes on this machine, to be killed; and a line to be cut.

Sites and driver make numbers instead of training, by the couriers' and the spool's own interface:
`python -m tests.fed.remote.rig site NAME FOLDER` and `… driver FOLDER ROUNDS SITE …`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

from fed.remote import flare
from fed.remote.courier import RemoteFlags
from fed.remote.spool import STATE, Spool, digest
from llava.atomic import atomic_write, write_text

ROOT = Path(__file__).parents[3]
STEPS = 10  # of a task, each of a twentieth of a second


def bytes_of(text: str, size: int) -> bytes:
    return (random.Random(text).randbytes(min(size, 2**20)) * (size // 2**20 + 1))[:size]


def work(site: str, state: bytes) -> bytes:
    """A site's answer to a state."""
    return bytes_of(f"{site} {hashlib.sha256(state).hexdigest()}", len(state))


def next_state(state: bytes, answers: Sequence[bytes]) -> bytes:
    return bytes_of(hashlib.sha256(b"".join([state, *answers])).hexdigest(), len(state))


def expected(sites: Sequence[str], rounds: int, size: int) -> str:
    """The SHA-256 of the last state of a run that nothing disturbs."""
    state = bytes_of("start", size)
    for _ in range(rounds):
        state = next_state(state, [work(site, state) for site in sites])
    return hashlib.sha256(state).hexdigest()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Rig:
    """The processes by name: `server`, `driver`, and the sites'.

    Args:
        folder: gets everything; `kits` are there already.
        size: bytes of a state.
    """

    def __init__(self, folder: Path, sites: Sequence[str], rounds: int = 2, size: int = 3_000_000):
        self.folder, self.sites, self.rounds, self.size = folder, list(sites), rounds, size
        self.processes: dict[str, subprocess.Popen] = {}

    def start(self, name: str) -> None:
        """Start the server, the driver that makes numbers, or a site that does."""
        me = "tests.fed.remote.rig"
        words = {
            "server": ["fed.remote.server", str(self.folder / "kits" / "localhost")],
            "driver": [me, "driver", str(self.folder), str(self.rounds), str(self.size),
                       *self.sites],
        }.get(name, [me, "site", name, str(self.folder)])  # fmt: skip
        self.launch(name, *words)

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
        return (self.folder / "result").exists()

    def result(self) -> str:
        return (self.folder / "result").read_text()

    def wait(self, happened: Callable[[], object], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            for name, process in self.processes.items():
                if process.poll() not in (None, 0):
                    raise AssertionError(f"{name} has ended\n{self.logs()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"not in {seconds} s: {what}\n{self.logs()}")
            time.sleep(0.1)

    def logs(self) -> str:
        files = [*self.folder.glob("*.log"), *self.folder.glob("*/flare.log"),
                 *self.folder.glob("spool/.watch.log")]  # fmt: skip
        return "\n".join(f"== {f}\n{f.read_text(errors='replace')[-2000:]}" for f in files)

    def close(self) -> None:
        """End all, and check that nothing of it is left within five seconds."""
        for name in list(self.processes):
            self.processes[name].terminate()
        for name in list(self.processes):
            try:
                self.processes.pop(name).wait(15)
            except subprocess.TimeoutExpired:
                raise AssertionError(f"{name} does not end\n{self.logs()}") from None
        deadline = time.monotonic() + 5
        while left := commands(str(self.folder)):
            if time.monotonic() > deadline:
                for pid, _ in left:
                    os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"left at work: {left}")
            time.sleep(0.1)


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


def be_site(name: str, folder: Path) -> None:
    config = SimpleNamespace(
        name=name, kit=folder / "kits" / name, work=folder / name, source=Path("site.yaml")
    )
    courier = flare.SiteSide(config)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        while True:
            courier.keep_up()
            for spool in courier.spools():
                for key in spool.requests():
                    for step in range(STEPS):
                        time.sleep(0.05)
                        spool.tell(key, {"step": step, "steps": STEPS})
                        courier.keep_up()
                    file = spool.folder / "answer.tmp"
                    file.write_bytes(work(name, spool.file(key, STATE).read_bytes()))
                    spool.give(key, {"num_samples": 1}, file)
                    print(time.strftime("%H:%M:%S"), "answered", key, flush=True)
                spool.forget()
            time.sleep(0.1)
    finally:
        courier.close()


def be_driver(folder: Path, rounds: int, size: int, sites: Sequence[str]) -> None:
    root = folder / "spool"

    def say(*words) -> None:
        print(time.strftime("%H:%M:%S"), *words, flush=True)

    courier = flare.DriverSide(
        root, sites, RemoteFlags(fed_remote_kit=str(folder / "kits" / "admin"))
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    done = max((int(path.suffix[1:]) for path in folder.glob("state.*")), default=0)
    state = (folder / f"state.{done}").read_bytes() if done else bytes_of("start", size)
    spools = [Spool(root / site, site) for site in sites]
    shown: dict[str, str] = {}
    try:
        while done < rounds:
            keys = []
            for spool in spools:
                file = spool.folder / "sent.tmp"
                file.write_bytes(state)
                keys.append(spool.ask({"round": done + 1, "state": digest(file)}, file))
            pairs = list(zip(spools, keys, strict=True))
            while not all(spool.answer(key) for spool, key in pairs):
                courier.keep_up()
                if courier.status() != shown:
                    shown = courier.status()
                    say(shown)
                time.sleep(0.2)
            state = next_state(state, [s.answer(k).update.read_bytes() for s, k in pairs])
            done += 1
            with atomic_write(folder / f"state.{done}") as file:
                file.write(state)
            for spool, key in pairs:
                spool.withdraw(key)
            say("round", done)
    finally:
        courier.close()
    write_text(folder / "result", hashlib.sha256(state).hexdigest())


if __name__ == "__main__":
    if sys.argv[1] == "site":
        be_site(sys.argv[2], Path(sys.argv[3]))
    else:
        be_driver(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
