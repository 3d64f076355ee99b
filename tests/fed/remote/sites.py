"""Sites for tests: `python -m fed.site` as a process, or a stand-in that answers as a test says."""

from __future__ import annotations

import _thread
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from fed.clients.update import Update, save_update
from fed.remote.folder import ALIVE
from fed.remote.hello import Hello, model_fingerprint
from fed.remote.spool import DONE, FAILED, PROGRESS, REQUEST, UPDATE, Spool
from fed.remote.state_file import read_state
from fed.remote.ticket import Ticket, read_ticket, run_flags
from llava.errors import InputError
from tests.fed.remote.rig import ROOT, SECONDS, SITES, Rig


def wait_for(what: Callable[[], object], pause: float = 0.01):
    """The first true value of `what()`."""
    deadline = time.monotonic() + SECONDS
    while not (found := what()):
        assert time.monotonic() < deadline, "it has not come"
        time.sleep(pause)
    return found


def site_yaml(folder: Path, tiny: Path, name: str, spools: Path | str, /, **changes) -> Path:
    """Make `folder/NAME.yaml` of a site with the tiny model and the data `tiny/NAME.json`."""
    values = {
        "name": name,
        "data_path": str(tiny / f"{name}.json"),
        "image_folder": str(tiny / "images"),
        "model_name_or_path": str(tiny / "llm"),
        "vision_tower": str(tiny / "vision_tower"),
        "work": f"work-{name}",
        "courier": "folder",
        "folder": str(spools),
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    return path


def start(*words: str, log: Path) -> subprocess.Popen:
    """`python -m WORDS`, its output appended to `log`."""
    with open(log, "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def end(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        process.kill()
        process.wait()


def clients_yaml(folder: Path, *entries: dict) -> Path:
    path = folder / "sites.yaml"
    path.write_text(json.dumps({"clients": list(entries)}))
    return path


def start_run(
    rig: Rig, flags: Callable[..., list[str]], model: Path, of_site: dict | None = None, **common
) -> Path:
    """Let the rig's driver and sites be a run of `fed.train`; its output folder.

    `of_site` has more keys of site.yaml, by site.
    """
    kits_of, output = rig.folder / "kits", rig.folder / "out"
    for name in SITES:
        site = {"courier": "flare", "folder": None, "kit": str(kits_of / name)}
        site |= (of_site or {}).get(name, {})
        file = site_yaml(rig.folder, model, name, "", **site)
        rig.commands[name] = ["fed.site", str(file)]
    names = clients_yaml(rig.folder, *({"name": name} for name in SITES))
    remote = {"fed_driver": "remote", "fed_remote_kit": kits_of / "admin"}
    argv = flags(fed_clients=names, output_dir=output, **common, **remote)
    rig.commands["driver"] = ["fed.train", *argv]
    for name in ("server", *SITES, "driver"):
        rig.start(name)
    return output


def rounds_of(output: Path) -> int:
    file = output / "rounds.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def is_at_work(spool: Path) -> bool:
    """Whether a site has told of a step, and has not answered."""
    names = [path.name for path in spool.glob("*")] if spool.is_dir() else []
    ends = {kind: {n.removesuffix(kind) for n in names if n.endswith(kind)}
            for kind in (PROGRESS, DONE, FAILED, REQUEST)}  # fmt: skip
    return bool(ends[PROGRESS] & ends[REQUEST] - ends[DONE] - ends[FAILED])


class StandIn(threading.Thread):
    """Answers as a site without a model: what it sends back is the state that it was sent, moved.

    Args:
        answer: `(stand-in, spool, key, ticket)` instead of the usual answer to a task.
    """

    def __init__(
        self,
        output: Path,
        tiny: Path,
        name: str,
        answer: Callable[[StandIn, Spool, str, Ticket], None] | None = None,
        samples: int = 12,
    ):
        super().__init__(daemon=True)
        self.folder, self.tiny, self.name_of_site = output / "fed" / "spool" / name, tiny, name
        self.reply, self.samples = answer or StandIn.usual, samples
        self.tickets: list[Ticket] = []
        self.ended = threading.Event()
        self.error: BaseException | None = None

    def __enter__(self) -> StandIn:
        self.start()
        return self

    def __exit__(self, *exception) -> None:
        self.ended.set()
        self.join()
        assert self.error is None, self.error

    def run(self) -> None:
        try:
            while not self.ended.wait(0.02):
                if self.folder.is_dir():
                    self.look(Spool(self.folder, self.name_of_site))
        except BaseException as error:
            self.error = error
            _thread.interrupt_main()  # or the driver would wait for ever

    def look(self, spool: Spool) -> None:
        spool.forget()
        (self.folder / ALIVE).write_text("here")
        for key in spool.requests():
            ticket = read_ticket(spool.ticket(key), spool.site, run_flags())
            self.tickets.append(ticket)
            if ticket.kind == "hello":
                try:
                    spool.give(key, self.hello().as_json())
                except InputError as error:
                    spool.fail(key, str(error), refused=True)
            elif ticket.kind == "stop":
                spool.give(key, {})
            else:
                self.reply(self, spool, key, ticket)

    def hello(self) -> Hello:
        cache = self.folder / "fingerprints.json"
        model, tower = (
            model_fingerprint(str(self.tiny / part), cache) for part in ("llm", "vision_tower")
        )
        return Hello(self.samples, "0123456789abcdef", model, tower)

    def update(self, spool: Spool, key: str, ticket: Ticket) -> Update:
        """A good answer: half of a one-pass run's samples each round, all values one higher."""
        state, _ = read_state(spool, key, ticket)
        rounds = int(ticket.flags.get("fed_rounds", 1))
        metrics = {"loss": 1.5, "steps": 3, "seconds": 0.1}
        samples = self.samples // (rounds - ticket.from_round + 1)
        return Update({n: t + 1 for n, t in state.items()}, samples, metrics)

    def usual(self, spool: Spool, key: str, ticket: Ticket) -> None:
        self.give(spool, key, self.update(spool, key, ticket))

    @staticmethod
    def give(spool: Spool, key: str, update: Update) -> Path:
        """Answer with an update; returns its file."""
        file = spool.folder / ".update.tmp"
        save_update(update, file)
        spool.give(key, {}, file)
        return spool.file(key, UPDATE)
