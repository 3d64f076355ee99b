"""What trains at a site: the resident driver with one client, or the site's own command.

It is built out of the site's site.yaml and a ticket's flags, by the same steps as `fed.train` takes
for all clients, so that a site's update is that of a resident run, to the bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, cast

import torch

from fed import methods, validation
from fed.arguments import CLIENT_FLAGS
from fed.clients.clients_yaml import ClientSpec
from fed.clients.task import ClientError, ClientTask, Log
from fed.clients.tensor_file import load_with_facts, save_with_facts
from fed.clients.update import Update
from fed.drivers import driver as drivers
from fed.drivers.driver import Driver, Run
from fed.drivers.resident import ResidentDriver
from fed.remote.hello import Hello, data_fingerprint, model_fingerprint, versions
from fed.remote.site_yaml import SiteConfig
from fed.remote.ticket import Ticket, words
from fed.site.kept_answer import forget_answers
from fed.state import State
from llava.errors import InputError
from llava.train import private_run
from llava.train.data import load_records
from llava.train.private_accounting import Guarantee
from llava.train.private_arguments import PrivacyArguments
from llava.train.settings import DECIDING, fingerprint

Tell = Callable[[Mapping[str, Any]], None]


@dataclass
class FinalState:
    """The end of a run, as much as `ClientStore.export` needs of `RoundState`."""

    round: int
    shared: State
    personal: dict[str, State] = field(default_factory=dict)
    memory: State = field(default_factory=dict)


class Trainer:
    """A model and the site's data, loaded for a ticket's settings.

    Args:
        run: of `make_run`.
        folder: the run's, within the site's work folder.
    """

    def __init__(self, config: SiteConfig, run: Run, folder: Path):
        self.config, self.folder = config, folder
        check_pictures(config)
        self.run = dataclasses.replace(run, log_of=self._log_of)
        self._data = str(fingerprint(config.data_path))  # before it is read: a change is seen later
        kind = drivers.get(self.run.arguments.fed.fed_driver)
        self.driver: Driver = kind(self.run)
        self.client = self.driver.clients[0]
        self._tell: Tell = lambda progress: None
        self._loss: float | None = None
        if isinstance(self.driver, ResidentDriver):
            logged = self.driver.log_of  # of the store's: what is a client's own stays here
            self.driver.log_of = lambda name: self._with_progress(logged(name))

    @staticmethod
    def mark(config: SiteConfig, ticket: Ticket) -> tuple[Any, ...]:
        """Tickets of one mark are served by one trainer."""
        method = methods.get(str(ticket.flags.get("fed_method", "fedavg")))
        private = PrivacyArguments.DECIDING & {*ticket.flags, *config.flags}
        # What is kept between a run's tasks, its noise's secret too, is kept in the run's folder.
        return ticket.settings(), (method.store or private) and ticket.run

    def close(self) -> None:
        """Give the memory back."""
        self.driver.close()
        del self.driver, self.client
        gc.unfreeze()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def hello(self, run: str) -> Hello:
        """The site's facts."""
        cache = self.config.work / "fingerprints.json"
        model = model_fingerprint(self.config.model_name_or_path, cache)
        tower = model_fingerprint(self.config.vision_tower, cache)
        deciding = DECIDING | PrivacyArguments.DECIDING
        flags = {k: v for k, v in self.config.flags.items() if k in deciding}
        if self.config.process.command:
            flags["command"] = "its own"
        signing = ""
        if self.secure:
            from fed.site.held import Held

            signing = Held.public_key(self.config)
        return Hello(
            signing=signing,
            samples=len(self.driver.datasets[0]),
            data=data_fingerprint(self._data, run, self.config.work / "fingerprint-secret"),
            model=model,
            tower=tower,
            flags=flags,
            versions=versions(),
        )

    @property
    def secure(self) -> bool:
        """Whether updates stay here, and take part in secure sums."""
        return self.run.arguments.fed.fed_secure

    def hold(self, ticket: Ticket, base: State, sent: State, update: Update) -> Update:
        """Keep a task's update; returns what is told of it."""
        from fed.site.held import Held

        return Held(self.config, self.run, self.folder).keep(ticket, base, sent, update)

    def answer_sum(self, ticket: Ticket, state: State, given: State) -> Update:
        """The site's message in a secure sum."""
        from fed.remote.sums import answer_of
        from fed.site.held import Held

        return answer_of(Held(self.config, self.run, self.folder).answer(ticket, state, given))

    def has_changed(self) -> bool:
        """Whether the records on the disk are no longer those that were loaded."""
        return fingerprint(self.config.data_path) != self._data

    def fit(self, ticket: Ticket, key: str, state: State, extras: State, tell: Tell) -> Update:
        """Do a task; what the client keeps of it is on this machine's disk when this returns.

        Args:
            key: of the request: another one of the same round begins anew.
            tell: is given {step, steps, total} and perhaps {loss}; what it raises ends the task.
        """
        task = ClientTask(
            self.client,
            state,
            ticket.round,
            self.folder / f"round-{ticket.round:04d}",
            extras,
            self._kept(ticket),
            ticket.last_round,
        )
        self._begin(task, key)
        self._tell, self._task = tell, task
        ((_, result),) = self.driver.run([task], lambda: True)
        if isinstance(result, ClientError):
            raise result
        if result.kept:
            save_with_facts(result.kept, {}, self._kept_file(ticket.round))
        for file in (self.folder / "kept").glob("[0-9]*.safetensors"):
            if int(file.stem) not in (ticket.last_round, ticket.round):
                file.unlink()
        shutil.rmtree(task.folder, ignore_errors=True)
        return result

    def export(self, ticket: Ticket, state: State, extras: State) -> None:
        """Write the checkpoint that the run leaves at this site, into the run's folder."""
        name = self.config.name
        personal = {name: state} if self.run.method.personal else {}
        final = FinalState(ticket.round, state, personal)
        self.driver.store.config.use_cache = True
        self.driver.store.export(cast(Any, final), lambda client: (state, extras), self.folder)
        self.driver.store.config.use_cache = False
        if stated := self.stated:
            private_run.finish(self.folder, stated, f"{name}, by {self.run.method.name}")

    @property
    def stated(self) -> Mapping[str, Guarantee]:
        """What the site's records are promised, where it trains in private."""
        private = getattr(self.driver, "private", None)
        return {} if private is None else private.stated

    def _kept_file(self, round: int) -> Path:
        return self.folder / "kept" / f"{round:04d}.safetensors"

    def _kept(self, ticket: Ticket) -> State:
        """What the client kept of its last task that counted."""
        rule = self.run.method.client_rule
        if rule is None or not rule.keeps or not ticket.last_round:
            return {}
        return load_with_facts(self._kept_file(ticket.last_round))[0]

    def _begin(self, task: ClientTask, key: str) -> None:
        """Remove checkpoints of another request: only the same one goes on from them."""
        begun = self.folder / "begun"
        work = self.driver.store.work_dir(task)
        work = task.work_dir if not isinstance(self.driver, ResidentDriver) else work
        if not begun.exists() or begun.read_text() != key:
            shutil.rmtree(work, ignore_errors=True)
            begun.write_text(key)

    def _log_of(self, name: str) -> Log:
        """The run's log, which goes no further than to the driver's progress."""

        def log(step: int, values: Mapping[str, float]) -> None:
            self._loss = values.get("loss")

        return log

    def _with_progress(self, logged: Log) -> Log:
        def log(step: int, values: dict[str, float]) -> None:
            self._loss = None
            logged(step, values)
            client, round = cast(Any, self.client), self._task.round
            before = sum(client.steps(earlier) for earlier in range(1, round))
            told = {"step": step - before, "steps": client.steps(round), "total": step}
            hidden = self._loss is None or self.secure
            self._tell(told if hidden else {**told, "loss": self._loss})

        return log


def make_run(config: SiteConfig, ticket: Ticket, folder: Path) -> Run:
    """The run of this site alone; `InputError` for flags that do not go together here."""
    own = {
        "model_name_or_path": config.model_name_or_path,
        "vision_tower": config.vision_tower,
        "output_dir": str(folder),
        "report_to": "none",
        "fed_clients": str(config.source),
        "fed_driver": "script" if config.process.command else "resident",
        "fed_wire": "float32",  # updates are put into the form of the ticket when they are sent
        **({"image_folder": str(config.image_folder)} if config.image_folder else {}),
        **config.flags,
    }
    argv = [*words(ticket.flags), *words(own)]
    argv = validation.driver_of(argv).command_line(argv)
    arguments, options = validation.check_flags(validation.parse_arguments(argv))
    privacy = sorted(PrivacyArguments.DECIDING & config.flags.keys())
    if arguments.fed.fed_dp_shares and privacy:
        raise InputError(
            f"{config.source}: {privacy[0]} under flags has no place in a run with noise in "
            "shares, --fed_dp_shares True, of which all clients add the same"
        )
    spec = ClientSpec(
        config.name,
        str(config.data_path),
        None if config.image_folder is None else str(config.image_folder),
        cast(Any, ticket.own) | {k: v for k, v in config.flags.items() if k in CLIENT_FLAGS},
        config.process,
        ticket.task,
        ticket.from_round,
    )
    client_args = [validation.arguments_of(spec, argv, arguments)]
    method = methods.get(arguments.fed.fed_method)
    return Run([spec], arguments, client_args, method, options, lambda name: lambda *told: None)


def check_pictures(config: SiteConfig) -> None:
    """Refuse records whose pictures do not lie below the image folder, before one is opened."""
    for index, record in enumerate(load_records(config.data_path)):
        images = record.get("image")
        for image in images if isinstance(images, list) else [images]:
            if isinstance(image, str) and _leaves(image):
                raise InputError(
                    f"{config.data_path}: record {index} has the picture {image!r}, which is not "
                    "below image_folder; a path that stays within it is expected"
                )


def _leaves(path: str) -> bool:
    """Whether a relative path leads out of its folder, or it is none."""
    return any(
        kind(path).is_absolute() or kind(path).drive or ".." in kind(path).parts
        for kind in (PurePosixPath, PureWindowsPath)
    )


def remove_run(folder: Path) -> None:
    """Remove what a finished run needs no more; its checkpoint and private parameters stay."""
    forget_answers(folder)
    for name in ("kept", "held", "logs", "begun"):
        with contextlib.suppress(OSError):
            (folder / name).unlink() if (folder / name).is_file() else shutil.rmtree(folder / name)
