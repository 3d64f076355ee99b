"""The remote driver: clients are sites on other machines, each a `python -m fed.site`.

clients.yaml names the sites and no paths. A site is asked by a ticket in its spool,
OUTPUT/fed/spool/NAME, which a courier carries; its answer comes back there. Before its first task a
site tells what it has (`fed.remote.hello`): that belongs to the run, lies in OUTPUT/fed/hello, and
a site whose data or model are others later is refused. All sites of a round are at work at once.
A site that is away is waited for, at most --fed_client_timeout seconds a task.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fed import state as states
from fed.clients import reliability
from fed.clients.clients_yaml import ClientSpec
from fed.clients.slices import cut
from fed.clients.store import ClientStore, FinishedRun, Sent
from fed.clients.task import ClientError, ClientTask, Result
from fed.clients.update import Update, load_update, save_update
from fed.clients.wire import decode, form_of
from fed.drivers.driver import Driver, Participant, Run, driver
from fed.drivers.run_name import run_name
from fed.drivers.start import as_one_process, starting_point
from fed.methods.interface.checks import check_not_zero
from fed.remote.board import Board
from fed.remote.courier import AWAY, RemoteFlags, make_courier
from fed.remote.hello import Hello, model_fingerprint, read_hello, versions
from fed.remote.spool import Answer, Spool
from fed.remote.state_file import Sender
from fed.remote.ticket import Ticket, deciding, digest_of, flags_of
from llava.atomic import write_text
from llava.errors import InputError
from llava.json_files import read_json
from llava.train.private_arguments import PrivacyArguments

if TYPE_CHECKING:  # `fed.privacy` needs an extra
    from fed.clients.sum_client import Agreed, SumRequest
    from fed.clients.sums_here import Summing
    from fed.methods.interface.sums import Sums

PAUSE = 0.2  # seconds between two looks at the spools
FAREWELL = 60.0  # seconds that sites have to take the run's last state
PROGRESS = ("step", "steps", "total", "loss")  # what a site tells of a task
GONE = 5.0  # seconds after which one that is away is not waited for at the end


@dataclass
class RemoteClient:
    """A site: its name, and its slices once it has told how many samples it has."""

    name: str
    from_round: int
    hello: Hello | None = None
    slices: list[list[int]] = field(default_factory=list)

    def samples(self, round: int) -> int:
        """The number of samples of a round; 1 for a site that has not told yet, and takes part."""
        if self.hello is None:
            return int(round >= self.from_round)
        return len(self.slices[round - 1])


@dataclass(frozen=True)
class _Asked:
    """A request that is under way."""

    client: RemoteClient
    key: str
    what: str  # for people: the request's kind, or the task's round
    task: ClientTask | None  # None: no task
    began: float


@driver("remote")
class RemoteDriver(Driver):
    """Asks sites for their tasks, all at once, and waits."""

    flags = RemoteFlags
    clients_keep = True
    data_here = False
    may_fail = True

    clients: list[RemoteClient]
    datasets: list[range]

    def __init__(self, run: Run):
        flags = run.flags(RemoteFlags)
        self.run_of, self.folder = run, run.output_dir / "fed"
        self.timeout, self.retries = flags.fed_client_timeout, flags.fed_client_retries
        start = starting_point(run)
        self.initial, self.part = start.initial, start.store.part
        self.session = start.session if run.arguments.fed.fed_eval_data_path else None
        self.store: ClientStore = _Store(start.store, self._part_with)
        self.flags_sent = flags_of(run)
        if run.arguments.fed.fed_secure:
            _check_alike(run.specs)
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as opened:
            self.run_name = run_name(self.folder)
            names = [spec.name for spec in run.specs]
            self.spools = {name: Spool(self.folder / "spool" / name, name) for name in names}
            self.courier = make_courier(self.folder / "spool", names, flags)
            opened.callback(self.courier.close)
            self.board = Board(self.folder / "sites.json", names)
            self.clients = [RemoteClient(spec.name, spec.from_round) for spec in run.specs]
            # As long as each site's data; of one that has not told yet, long enough.
            self.datasets = [range(run.rounds) for _ in run.specs]
            self._model = self._own_model()
            self._meet_known()
            self._meet([client for client in self.clients if client.from_round == 1])
            self._opened = opened.pop_all()

    @classmethod
    def command_line(cls, argv: list[str]) -> list[str]:
        return as_one_process(
            argv,
            "--fed_driver remote is one process, which trains nothing: a launcher and --deepspeed "
            "belong to a site's own command",
        )

    @classmethod
    def settings_of(cls, spec: ClientSpec) -> dict[str, Any]:
        """A site's own facts are compared by the site (`Ticket.facts`): a late one has none yet."""
        return {"samples": None, "data": None}

    def close(self) -> None:
        self._opened.close()

    # Hello.

    def _own_model(self) -> dict[str, str]:
        """Fingerprints of the model here; "" of a part of which there is but a config."""
        model, cache = self.run_of.arguments.model, self.folder / "fingerprints.json"
        paths = {"model": model.model_name_or_path, "tower": str(model.vision_tower)}
        return {name: model_fingerprint(path, cache) for name, path in paths.items()}

    def _meet_known(self) -> None:
        """Take in what sites told at an earlier start."""
        for client in self.clients:
            file = self._hello_file(client)
            if file.exists():
                self._know(client, read_hello(read_json(file), str(file)))

    def _hello_file(self, client: RemoteClient) -> Path:
        return self.folder / "hello" / f"{client.name}.json"

    def _meet(self, clients: Sequence[RemoteClient]) -> None:
        """Wait until sites have told what they have; some may be left out as a round allows it."""
        new = [client for client in clients if client.hello is None]
        least, away = self.run_of.arguments.fed.fed_min_clients, list[ClientError]()
        for one, answer in self._collect([self._ask_hello(client) for client in new]):
            try:
                self._learn(one.client, answer)
            except ClientError as error:
                if answer is not None:
                    raise
                away.append(error)
        if away and (not least or len(clients) - len(away) < least):
            raise away[0]
        for left_out in away:
            print(f"{left_out}; the run begins without it", flush=True)

    def _ask_hello(self, client: RemoteClient) -> _Asked:
        ticket = self._ticket("hello", client, nonce=uuid.uuid4().hex)
        key = self.spools[client.name].ask(ticket.as_json())
        return _Asked(client, key, "hello", None, time.monotonic())

    def _learn(self, client: RemoteClient, answer: Answer | InputError | None) -> None:
        """Take in a site's facts; `ClientError` where it cannot have a part in the run."""
        who = f"site {client.name}"
        if answer is None:
            raise ClientError(f"{who} has not answered within {self.timeout:g} s")
        try:
            if isinstance(answer, InputError):
                raise answer
            if answer.reason is not None:
                raise InputError(f"{who} says: {answer.reason}")
            hello = read_hello(answer.facts, who)
            for part, what in (("model", "language model"), ("tower", "vision tower")):
                found = getattr(hello, part)
                known = [getattr(c.hello, part) for c in self.clients if c.hello]
                for expected in {self._model[part], *known} - {"", found}:
                    raise InputError(
                        f"{who} has another {what} than this run: the fingerprint of its files is "
                        f"{found}, expected {expected}"
                    )
        except InputError as error:
            raise ClientError(str(error)) from None
        write_text(self._hello_file(client), json.dumps(hello.as_json(), indent=1))
        here = versions()
        for name, version in hello.versions.items():
            if here.get(name) != version:
                print(f"{who} has {name} {version}, here it is {here.get(name)}", flush=True)
        print(f"{who}: {hello.samples} samples", flush=True)
        self._know(client, hello)

    def _know(self, client: RemoteClient, hello: Hello) -> None:
        client.hello = hello
        self.datasets[self.clients.index(client)] = range(hello.samples)
        (client.slices,) = cut(
            [self._spec(client)],
            [hello.samples],
            self.run_of.rounds,
            one_pass=self.run_of.arguments.fed.fed_one_pass,
            seed=self.run_of.arguments.training.seed,
        )

    def _spec(self, client: RemoteClient) -> ClientSpec:
        return self.run_of.specs[self.clients.index(client)]

    # Tasks.

    def drawn_from(self, round: int) -> list[Participant]:
        """The sites that clients.yaml has in the round.

        Not by samples: how many a late site has is not known before it is asked, and a round that
        is begun again after that would have others. One without samples in it sends nothing.
        """
        return [client for client in self.clients if client.from_round <= round]

    def run(
        self, tasks: Sequence[ClientTask], go_on: Callable[[], bool]
    ) -> Generator[tuple[ClientTask, Result], None, None]:
        if not tasks or not go_on():
            return
        sender = Sender()
        asked = []
        for task in tasks:
            client = task.client
            if not client.samples(task.round):
                continue
            if client.hello is None:
                asked.append(self._ask_hello(client))
            else:
                asked.append(self._ask(task, sender))
        keys = {one.key for one in asked}
        for spool in self.spools.values():  # what an earlier start has asked for, or a late round
            spool.withdraw_all(but=keys)
        of_client = {task.name: task for task in tasks}
        names = {one.client.name for one in asked}
        for task in tasks:
            if task.name not in names:
                yield task, _nothing(task)
        for one, answer in self._collect(asked):
            task = of_client[one.client.name]
            try:
                if one.task is None:
                    self._learn(one.client, answer)
                    if task.client.samples(task.round):
                        asked.append(self._ask(task, sender))
                        continue
                    yield task, _nothing(task)
                    continue
                yield task, self._update(task, one, answer)
            except ClientError as error:
                if answer is not None and self._try_again(task, answer, str(error)):
                    print(f"{error}; it is asked again", flush=True)
                    asked.append(
                        self._ask_hello(one.client) if one.task is None else self._ask(task, sender)
                    )
                else:
                    yield task, error

    def _ask(self, task: ClientTask, sender: Sender) -> _Asked:
        ticket = self._ticket_of(task, "task", nonce=f"{self._tries(task):032x}")
        key = sender.ask(self.spools[task.name], task.state, task.extras, ticket)
        return _Asked(task.client, key, f"round {task.round}", task, time.monotonic())

    def _ticket_of(self, task: ClientTask, kind: str, **more: Any) -> Callable[..., Ticket]:
        """The maker of a ticket on a task, for `Sender.ask`."""
        client: RemoteClient = task.client
        assert client.hello is not None
        return functools.partial(
            self._ticket,
            kind,
            client,
            round=task.round,
            last_round=task.last_round,
            facts=client.hello.digest,
            **more,
        )

    def _ticket(self, kind: str, client: RemoteClient, **more: Any) -> Ticket:
        spec = self._spec(client)
        return Ticket(
            kind,
            self.run_name,
            client.name,
            flags=self.flags_sent,
            own=dict(spec.overrides),
            task=spec.task,
            from_round=spec.from_round,
            **more,
        )

    def _tries_file(self, task: ClientTask) -> Path:
        return task.folder / f"{task.name}.tries"

    def _tries(self, task: ClientTask) -> int:
        """How often the task has failed: a failure is not to be taken for the next try's."""
        file = self._tries_file(task)
        return int(read_json(file)["failed"]) if file.exists() else 0

    def _try_again(self, task: ClientTask, answer: Answer | InputError, reason: str) -> bool:
        """Count a failure; whether the site is to try once more."""
        failed = self._tries(task) + 1
        write_text(self._tries_file(task), json.dumps({"failed": failed, "last": reason}))
        refused = isinstance(answer, Answer) and answer.refused
        return not refused and failed % (1 + self.retries) != 0

    def _update(self, task: ClientTask, one: _Asked, answer: Answer | InputError | None) -> Update:
        """An answer as an update, checked, its file in the place of the round's.

        Raises:
            ClientError: there is none, or it is not what a task's answer is.
        """
        who, spool = f"client {task.name}, round {task.round}", self.spools[task.name]
        try:
            if answer is None:
                away = self.courier.status()[task.name]
                raise InputError(f"no answer within {self.timeout:g} s (the site is {away})")
            if isinstance(answer, InputError):
                raise answer
            if answer.reason is not None:
                raise InputError(f"site {task.name} says: {answer.reason}")
            if answer.update is None:
                raise InputError("the answer has no update")
            travelled = load_update(answer.update)
            secure = self.run_of.arguments.fed.fed_secure
            wire, form = self.run_of.arguments.fed.fed_wire, form_of(travelled)
            if form != wire:
                raise InputError(f"its state came as {form}, --fed_wire is {wire}")
            update = travelled if secure else decode(travelled, task.state, "its state")
            self._check(task, update)
            task.folder.mkdir(parents=True, exist_ok=True)
            if update is travelled:
                os.replace(answer.update, task.update_file)
            else:
                save_update(update, task.update_file)
        except InputError as error:
            raise ClientError(f"{who}: {error}") from None
        finally:
            spool.withdraw(one.key)
        return update

    def _check(self, task: ClientTask, update: Update) -> None:
        """Refuse what no task's answer has; the loop checks what methods need besides."""
        expected = task.client.samples(task.round)
        if update.num_samples != expected:
            raise InputError(f"it says {update.num_samples!r} samples, expected {expected}")
        if update.kept:
            raise InputError("it has tensors that the site should keep")
        secure = self.run_of.arguments.fed.fed_secure
        rule = self.run_of.method.client_rule
        extras = task.state if rule is not None and rule.sends and not secure else {}
        states.check(update.state, like={} if secure else task.state, who="its state")
        states.check(update.extras, like=extras, who="what it sent beside its state")
        if not secure:
            check_not_zero(update.state, task.state, "its state")
        metrics = update.metrics
        told = self._told(task.client)
        numbers = [metrics.get(name) for name in told]
        beyond = metrics.keys() - {*told, "parameters", *(() if secure else ("explained",))}
        counts = metrics.get("parameters", {})
        numbers += counts.values() if isinstance(counts, dict) else [None]
        if beyond or not all(_is_number(number) for number in numbers):
            raise InputError(f"its measures are {str(metrics):.200}")
        reliability.read(metrics.get("explained"))

    def _told(self, client: RemoteClient) -> list[str]:
        """The numbers that a site tells of a task: no loss of one whose update is in a secure sum,
        and no time either of one that trains in private, because the run or the site says so."""
        fed, hello = self.run_of.arguments.fed, client.hello
        if fed.private or (hello is not None and PrivacyArguments.DECIDING & hello.flags.keys()):
            return ["steps"]
        return ["steps", "seconds"] if fed.fed_secure else ["steps", "seconds", "loss"]

    # Secure sums.

    @property
    def common_settings(self) -> str:
        return digest_of(deciding(self.flags_sent))

    def summing(
        self,
        folder: Path,
        tasks: Sequence[ClientTask],
        sums: Sums,
        agreed: Agreed,
        explained: Mapping[str, Sequence[float]],
    ) -> Summing:
        from fed.remote.sums import SumsAtSites

        of_site = {task.name: task for task in tasks}
        keys = {n: bytes.fromhex(task.client.hello.signing) for n, task in of_site.items()}
        return SumsAtSites(keys, functools.partial(self._ask_sums, of_site, agreed.weight))

    def _ask_sums(
        self, tasks: Mapping[str, ClientTask], weight: float, requests: Mapping[str, SumRequest]
    ) -> Generator[tuple[str, Answer | InputError | None], None, None]:
        """Ask sites for a step of a secure sum, and give the answers as they come."""
        from fed.remote.sums import state_of

        sender, asked = Sender(), []
        for name, request in requests.items():
            task = tasks[name]
            ticket = self._ticket_of(
                task, "sum", exchange=request.exchange, step=request.step, weight=weight
            )
            key = sender.ask(self.spools[name], state_of(request), request.given, ticket)
            what = f"sums of round {task.round}"
            asked.append(_Asked(task.client, key, what, None, time.monotonic()))
        keys = {one.key for one in asked}
        for name in requests:
            self.spools[name].withdraw_all(but=keys)
        for one, answer in self._collect(asked):
            yield one.client.name, answer

    # Waiting.

    def _collect(
        self, asked: list[_Asked]
    ) -> Generator[tuple[_Asked, Answer | InputError | None], None, None]:
        """Answers as they come, None for one that did not come in time.

        Args:
            asked: may grow meanwhile.
        """
        limit = self.timeout or math.inf
        logged: dict[str, Any] = {}
        done: set[str] = set()
        while left := [one for one in asked if one.key not in done]:
            self.courier.keep_up()
            self._show(left, logged)
            for one in left:
                spool = self.spools[one.client.name]
                answer: Answer | InputError | None
                try:
                    answer = spool.answer(one.key)
                except InputError as error:
                    answer = error
                if answer is None and time.monotonic() - one.began < limit:
                    continue
                done.add(one.key)
                yield one, answer
                if one.task is None:  # it has been read: the site need not keep it
                    spool.withdraw(one.key)
            if any(one.key not in done for one in asked):
                time.sleep(PAUSE)
        self._show([], logged)

    def _show(self, left: Sequence[_Asked], logged: dict[str, Any]) -> None:
        """The sites' state on the board, their new losses in the run's log."""
        progress = {}
        for one in left:
            told = self.spools[one.client.name].progress(one.key)
            told = {k: told[k] for k in PROGRESS if _is_number(told.get(k))}
            if told:
                progress[one.client.name] = told
            if one.task and told and told != logged.get(one.key):
                logged[one.key] = told
                if "loss" in told and "total" in told:
                    log = self.run_of.log_of(one.client.name)
                    log(int(told["total"]), {"loss": float(told["loss"])})
        asked = {one.client.name: one.what for one in left}
        self.board.show(self.courier.status(), asked, progress)

    # The end.

    def _part_with(self, final: FinishedRun, sent: Sent) -> None:
        """Give each site the run's last state, of which it makes its own checkpoint."""
        sender, asked = Sender(), []
        for client in self.clients:
            if client.hello is None:
                continue
            more = {"round": final.round, "facts": client.hello.digest}
            ticket = functools.partial(self._ticket, "stop", client, **more)
            spool = self.spools[client.name]
            key = sender.ask(spool, *sent(client.name), ticket)
            spool.withdraw_all(but={key})
            asked.append(_Asked(client, key, "stop", None, time.monotonic()))
        began = time.monotonic()
        while left := [one for one in asked if not self._has_taken(one)]:
            self.courier.keep_up()
            self._show(left, {})
            status, waited = self.courier.status(), time.monotonic() - began
            away = all(status[one.client.name].startswith(AWAY) for one in left)
            if waited > max(FAREWELL, self.timeout) or (away and waited > GONE):
                names = ", ".join(one.client.name for one in left)
                print(f"the last state is still to be taken by {names}", flush=True)
                return
            time.sleep(PAUSE)
        self._show([], {})

    def _has_taken(self, one: _Asked) -> bool:
        with contextlib.suppress(InputError):
            return self.spools[one.client.name].answer(one.key) is not None
        return True


class _Store(ClientStore):
    """Writes the run's checkpoints here, and lets the sites write theirs."""

    def __init__(self, inner: ClientStore, part_with: Callable[[FinishedRun, Sent], None]):
        super().__init__(inner.part, inner.config, inner.main)
        self.inner, self.part_with = inner, part_with

    def export(self, final: FinishedRun, sent: Sent, output_dir: Path) -> None:
        self.export_shared(final, sent, output_dir)
        self.part_with(final, sent)

    def export_shared(self, final: FinishedRun, sent: Sent, output_dir: Path) -> None:
        self.inner.export_shared(final, sent, output_dir)


def _check_alike(specs: Sequence[ClientSpec]) -> None:
    """Refuse flags of single clients, by which a server could make the others stand still."""
    for spec in specs:
        if own := deciding(spec.overrides):
            raise InputError(
                f"--fed_secure True: client {spec.name} has {min(own)} of its own in "
                "clients.yaml; there a site's own flags are those in its site.yaml"
            )


def _nothing(task: ClientTask) -> Update:
    """The update of a site that has no samples in the round."""
    return Update(task.state, 0, {"loss": None, "steps": 0, "seconds": 0.0})


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
