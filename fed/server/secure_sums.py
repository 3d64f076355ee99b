"""The server's side of a round of which it gets sums alone: exchange by exchange, step by step.

All that comes is written before it is used, so that a server that was killed goes on with the same
attempt: FOLDER/sum-N has the attempt's terms, of each step the clients' messages and, once it is
over, who was there; the sum itself, and then nothing else. An attempt that too few clients have
answered is over unless somebody may have unmasked it; the next one has fresh keys.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch

from fed.clients.sum_client import Agreed, SumRequest, common_of, exchange_name
from fed.clients.task import ClientError
from fed.clients.tensor_file import load_with_facts, save_with_facts
from fed.methods.interface.method import Outcome
from fed.methods.interface.sums import Given, Groups, Own, Round, Summed, Sums, begun_with
from fed.privacy.client_memory import STEPS
from fed.privacy.server import Server
from fed.privacy.terms import Terms
from fed.state import State
from llava.atomic import atomic_write, write_text
from llava.errors import InputError
from llava.json_files import read_json

# Requests by client -> each answer as it comes, or why there is none.
Ask: TypeAlias = Callable[
    [Mapping[str, SumRequest]], Iterable[tuple[str, "bytes | bytearray | ClientError"]]
]
Gone: TypeAlias = dict[str, str]  # why a client has left the sums, by name


class SecureSums:
    """The sums of one round.

    Args:
        folder: of the round, where it lies until the round is over.
        sites: the public key of each client that is asked.
        ask: brings requests to the clients.
    """

    def __init__(self, folder: Path, agreed: Agreed, sites: Mapping[str, bytes], ask: Ask):
        self.folder, self.agreed, self.sites, self._ask = folder, agreed, dict(sites), ask
        self.gone: Gone = {}

    def outcome(self, sums: Sums, round: Round) -> Outcome:
        """The method's outcome, from sums over the clients that stay, its facts' `clients`.

        Raises:
            InputError: too few clients are there; what is known of single ones is nothing.
        """
        server = sums.exchanges(round)
        given, there = next(server), list(self.sites)
        self._begun = begun_with(round.base, round.sent)
        exchange = 0
        while True:
            total, there = self._exchange(sums, round, exchange, given, there)
            try:
                given = server.send(total)
            except StopIteration as end:
                end.value.facts["clients"] = there
                return end.value
            exchange += 1

    def _exchange(
        self, sums: Sums, round: Round, exchange: int, given: Given, asked: list[str]
    ) -> tuple[Any, list[str]]:
        """The sums of an exchange, or by its groups' names `Summed`, and whose they are."""
        folder = self.folder / f"sum-{exchange}"
        if not isinstance(given, Groups):
            begun = common_of(sums, exchange, self._begun)
            return self._sum(folder, sums, round, exchange, given, begun, asked)
        totals, there = {}, set[str]()
        for number, (name, group) in enumerate(given.items()):
            place, clients = folder / str(number), [n for n in asked if n in group.clients]
            try:
                begun = begun_with(group.base)
                found = self._sum(place, sums, round, exchange, group.given, begun, clients)
            except InputError as error:
                raise InputError(f"the sum of {name}: {error}") from None
            totals[name], there = Summed(*found), there.union(found[1])
        return totals, [name for name in asked if name in there]

    def _sum(
        self,
        folder: Path,
        sums: Sums,
        round: Round,
        exchange: int,
        given: State,
        begun: Mapping[str, str],
        asked: list[str],
    ) -> tuple[State, list[str]]:
        """A sum of an exchange, and whose it is."""
        file = folder / "total.safetensors"
        if not file.exists():
            terms = self._attempt(folder, sums, round, exchange, given, begun, asked)
            server = Server(terms)
            try:
                self._steps(folder, server, exchange, given)
                total = server.finish()
            except InputError:
                if server.step != STEPS[-1]:
                    shutil.rmtree(folder)  # nobody has unmasked it
                raise
            save_with_facts(total.sums, {"clients": list(total.clients)}, file)
        for path in folder.iterdir():
            if path != file:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        found, facts = load_with_facts(file)
        return found, facts["clients"]

    def _attempt(
        self,
        folder: Path,
        sums: Sums,
        round: Round,
        exchange: int,
        given: State,
        begun: Mapping[str, str],
        asked: list[str],
    ) -> Terms:
        """The terms of the attempt that was begun, or of a new one."""
        file = folder / "terms.json"
        if file.exists():
            return Terms.from_bytes(file.read_bytes())
        nothing = {name: torch.zeros_like(tensor) for name, tensor in round.base.items()}
        extras = nothing if sums.method.sends_extras else {}
        like = sums.terms(exchange, Own(round.base, round.base, 0.0, extras), given)
        terms = Terms.new(
            self.agreed.run,
            self.agreed.round,
            exchange_name(exchange, given, self.agreed.settings, begun),
            {name: self.sites[name] for name in asked},
            self.agreed.layout(sums, like, len(asked)),
            self.agreed.threshold,
            self.agreed.least,
        )
        with atomic_write(file) as opened:
            opened.write(terms.to_bytes())
        return terms

    def _steps(self, folder: Path, server: Server, exchange: int, given: State) -> None:
        """All steps, as far as clients answer."""
        text = server.terms.to_bytes()
        messages = dict.fromkeys(server.terms.names, b"")
        for number, step in enumerate(STEPS):
            place, over = folder / step, folder / f"{step}.json"
            there = read_json(over)["clients"] if over.exists() else list(messages)
            requests = {
                name: SumRequest(exchange, step, text, messages[name], given) for name in there
            }
            for name, file in self._answers(place, requests, ask=not over.exists()):
                try:
                    server.receive(name, file.read_bytes())
                except InputError as error:
                    self.gone[name] = str(error)
                    file.unlink()
            answered = [name for name in there if name not in server.waiting]
            if number < len(STEPS) - 1:
                messages = server.proceed()
                if not over.exists():  # before anybody is told of it
                    write_text(over, json.dumps({"clients": answered}))

    def _answers(
        self, place: Path, requests: Mapping[str, SumRequest], ask: bool
    ) -> Generator[tuple[str, Path], None, None]:
        """The files of the clients' messages: those that are there, then those that are asked for,
        in the clients' order, for a server is what it is after the same messages in one order."""
        files = {name: place / f"{name}.message" for name in requests}
        missing = {name: request for name, request in requests.items() if not files[name].exists()}
        for name, answer in self._ask(missing) if ask and missing else ():
            if isinstance(answer, ClientError):
                self.gone[name] = str(answer)
                continue
            with atomic_write(files[name]) as file:
                file.write(answer)
        yield from ((name, file) for name, file in files.items() if file.exists())
