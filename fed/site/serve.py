"""A site at work: it answers the requests in its spools, one after the other."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fed.clients.update import Update, save_update
from fed.clients.wire import WIRES, encode
from fed.remote.courier import SiteCourier, make_site_courier
from fed.remote.hello import Hello
from fed.remote.site_yaml import SiteConfig
from fed.remote.spool import Spool
from fed.remote.state_file import read_state
from fed.remote.ticket import Ticket, deciding, read_ticket
from fed.site.kept_answer import KeptAnswer, is_good
from fed.site.trainer import Trainer, make_run, remove_run
from llava.atomic import own_name, write_text
from llava.errors import InputError
from llava.folder_lock import Lock
from llava.json_files import read_json
from llava.train.private_statement import sentence

PAUSE = 0.2  # seconds between two looks at the spools
BEAT = 1.0  # seconds between two calls of the courier


class RefusalError(InputError):
    """The site does not do what it is asked; the driver is told why."""


class WithdrawnError(Exception):
    """The request that was at work has been taken back."""


def serve(config: SiteConfig) -> None:
    """Answer requests until the process is ended."""
    config.work.mkdir(parents=True, exist_ok=True)
    lock = Lock(config.work, f"{config.source}: another process of this site is running")
    try:
        courier = make_site_courier(config)
        with contextlib.closing(courier), _beating(courier):
            _say(f"site {config.name}: ready")
            if not courier.spools():
                _say(f"there is no run yet that has a site {config.name}")
            site = Site(config)
            while True:
                if not any([site.look(spool) for spool in courier.spools()]):
                    time.sleep(PAUSE)
    finally:
        lock.release()


class Site:
    """The site of a site.yaml, with the model that it has loaded last."""

    def __init__(self, config: SiteConfig):
        self.config = config
        self._trainer: Trainer | None = None
        self._mark: tuple[Any, ...] = ()

    def look(self, spool: Spool) -> bool:
        """Answer the requests of a spool; returns whether there was one."""
        spool.forget()
        keys = spool.requests()
        for key in keys:
            if not spool.is_asked(key):  # any more
                continue
            try:
                self._answer(spool, key)
            except WithdrawnError:
                _say("the request was taken back")
            except RefusalError as error:
                _say(f"refused: {error}")
                spool.fail(key, str(error), refused=True)
            except Exception as error:  # the next request may do better
                if not isinstance(error, InputError):
                    traceback.print_exc()
                _say(f"failed: {error}")
                # What is wrong may say something of the data, and stays here.
                kind = type(error).__name__
                spool.fail(key, f"it came to nothing ({kind}); the site's own output says why")
        return bool(keys)

    def _answer(self, spool: Spool, key: str) -> None:
        ticket = self._ticket(spool, key)
        folder = self.config.work / "runs" / ticket.run
        folder.mkdir(parents=True, exist_ok=True)
        if ticket.kind == "hello":
            self._check_secure(ticket)
            hello = self._ready(ticket, folder).hello(ticket.run)
            write_text(folder / "hello.json", json.dumps(hello.as_json(), indent=1))
            spool.give(key, hello.as_json())
            _say(f"run {ticket.run[:8]}: told of {hello.samples} samples")
            return
        self._check_secure(ticket)
        trainer = self._ready(ticket, folder)
        self._check_same(ticket, trainer.hello(ticket.run), folder)
        state, extras = read_state(spool, key, ticket)
        if ticket.kind == "sum":
            file = own_name(spool.folder / "update")
            save_update(trainer.answer_sum(ticket, state, extras), file)
            spool.give(key, {}, file)
            return
        if ticket.kind == "stop":
            trainer.export(ticket, state, extras)
            remove_run(folder)
            spool.give(key, {})
            _say(f"run {ticket.run[:8]}: over, its checkpoint is in {folder}")
            return
        where = f"run {ticket.run[:8]}: round {ticket.round}"
        answer = KeptAnswer(folder, ticket, self.config)
        if answer.is_there():
            _say(f"{where} is done; its update is handed over again")
        else:
            _say(f"{where} begins")
            update = trainer.fit(ticket, key, state, extras, _teller(spool, key))
            if trainer.secure:
                sent = trainer.hold(ticket, state, extras, update)
            else:
                metrics = {k: v for k, v in update.metrics.items() if k in _MEASURES}
                sent = Update(update.state, update.num_samples, metrics, update.extras)
                sent = encode(sent, state, str(ticket.flags.get("fed_wire", WIRES[0])))
            answer.keep(sent, is_good(update, state, sent.metrics))
            _say(f"{where} done, {update.num_samples} samples, loss {update.metrics.get('loss')}")
        spool.give(key, {}, answer.second(spool.folder))

    def _check_secure(self, ticket: Ticket) -> None:
        """Refuse a run without secure sums where the site takes part in no other, and one with them
        where it knows no other site's key."""
        secure, trust = str(ticket.flags.get("fed_secure", "false")).lower() == "true", self.config
        if trust.trust and not secure:
            raise RefusalError(
                "its site.yaml has `trust`: it takes part in runs with --fed_secure True alone"
            )
        if secure and (own := deciding(ticket.own)):
            raise RefusalError(
                f"the run sets --{min(own)} for this site alone; in secure sums a site's "
                "own flags are those in its site.yaml"
            )
        if secure and not trust.trust:
            raise RefusalError(
                "its site.yaml has no `trust`, the public keys of the other sites, without which "
                "it takes part in no secure sum"
            )

    def _ticket(self, spool: Spool, key: str) -> Ticket:
        try:
            return read_ticket(spool.ticket(key), self.config.name, self.config.allowed)
        except InputError as error:
            raise RefusalError(str(error)) from None

    def _ready(self, ticket: Ticket, folder: Path) -> Trainer:
        """The trainer for a ticket: that which is loaded, or another one."""
        mark = Trainer.mark(self.config, ticket)
        if self._trainer is not None and (mark != self._mark or self._trainer.has_changed()):
            self._trainer.close()
            self._trainer = None
        if self._trainer is None:
            _say("loading the model")
            try:
                run = make_run(self.config, ticket, folder)
            except InputError as error:  # of flags alone: neither data nor model are looked at
                raise RefusalError(str(error)) from None
            self._trainer, self._mark = Trainer(self.config, run, folder), mark
            for name, stated in self._trainer.stated.items():
                _say(sentence(f"client {name}", stated))
        self._trainer.folder = folder
        return self._trainer

    def _check_same(self, ticket: Ticket, now: Hello, folder: Path) -> None:
        """Refuse to go on in a run with other data or another model than it began with."""
        if now.digest == ticket.facts:
            return
        then = read_json(folder / "hello.json") if (folder / "hello.json").exists() else {}
        for name, value in dataclasses.asdict(now).items():
            if name != "versions" and name in then and then[name] != value:
                raise RefusalError(
                    f"its {name} has changed since the run began: {then[name]!r}, now {value!r}; "
                    "bring back what was there, or begin another run"
                )
        raise RefusalError("it is not the site that took part in the run so far")


_MEASURES = ("loss", "steps", "seconds", "parameters", "explained")


def _teller(spool: Spool, key: str):
    """Writes the progress of a task, and ends it where nobody asks for it any more."""

    def tell(progress: Mapping[str, Any]) -> None:
        if not spool.is_asked(key):
            raise WithdrawnError
        spool.tell(key, dict(progress))

    return tell


@contextlib.contextmanager
def _beating(courier: SiteCourier) -> Iterator[None]:
    """Call the courier every second from another thread: a task takes longer."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT):
            courier.keep_up()

    thread = threading.Thread(target=beat, name="courier", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
