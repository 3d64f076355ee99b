"""What a site holds of its tasks in a run with secure sums: no update leaves it.

FOLDER/held/NNNN.safetensors is the round's state, what the method sends beside it, and the state
that the task began with; its facts are the number of samples, what the pictures have explained so
far, how the run sums, and digests of what the task began with. The last round that counted and the
newest are kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fed.clients import reliability
from fed.clients.sum_client import Agreed, SumClient, SumRequest, sums_of
from fed.clients.tensor_file import load_with_facts, save_with_facts
from fed.clients.update import Update
from fed.drivers.driver import Run
from fed.methods.interface.sums import Own, begun_with
from fed.privacy.keys import make_site_key, read_site_key
from fed.remote.site_yaml import SiteConfig
from fed.remote.sums import MESSAGE, TERMS, bytes_of
from fed.remote.ticket import Ticket, deciding, digest_of
from fed.server.reliability import gathered_sums
from fed.server.round_metrics import OPEN
from fed.state import State
from llava.errors import InputError

PARTS = ("state", "extras", "base")


class Held:
    """The site's part in the secure sums of one run.

    Args:
        folder: the run's, within the site's work folder.
    """

    def __init__(self, config: SiteConfig, run: Run, folder: Path):
        self.config, self.run, self.folder = config, run, folder / "held"

    @staticmethod
    def public_key(config: SiteConfig) -> str:
        """The site's public key, 64 hex digits; its private one is made when missing."""
        file = config.work / "signing.pem"
        if not file.exists():
            make_site_key(file)
        return read_site_key(file).public_key().public_bytes_raw().hex()

    def keep(self, ticket: Ticket, base: State, sent: State, update: Update) -> Update:
        """Keep a task's update; returns what is told of it.

        Args:
            base, sent: the state that the task began with, and what was sent beside it.
        """
        earlier = {}
        if ticket.last_round:
            explained = load_with_facts(self._file(ticket.last_round))[1]["explained"]
            earlier = {"": explained} if explained else {}
        told = reliability.read(update.metrics.get("explained"))
        sums = gathered_sums(earlier, {"": told})
        tensors = {
            f"{part}/{name}": tensor
            for part, state in zip(PARTS, (update.state, update.extras, base), strict=True)
            for name, tensor in state.items()
        }
        facts = {
            "samples": update.num_samples,
            "explained": sums.get(""),
            "summed": self._summed(ticket),
            "begun": begun_with(base, sent),
        }
        save_with_facts(tensors, facts, self._file(ticket.round))
        for file in self.folder.glob("[0-9]*.safetensors"):
            if int(file.stem) not in (ticket.last_round, ticket.round):
                file.unlink()
        metrics = {name: update.metrics[name] for name in OPEN if name in update.metrics}
        return Update({}, update.num_samples, metrics)

    def answer(self, ticket: Ticket, state: State, given: State) -> bytes | bytearray:
        """The site's message in a secure sum.

        Raises:
            InputError: the request is not one that the site takes part in.
        """
        for part in (TERMS, MESSAGE):
            if part not in state:
                raise InputError(f"a request of a secure sum has no {part}")
        request = SumRequest(
            ticket.exchange,
            ticket.step,
            bytes_of(state[TERMS]),
            bytes_of(state[MESSAGE]),
            given,
        )
        fed = self.run.arguments.fed
        least = max(fed.fed_secure_min, self.config.secure_min)
        agreed = Agreed(
            ticket.run,
            ticket.round,
            ticket.weight,
            fed.fed_secure_norm,
            least,
            settings=digest_of(deciding(ticket.flags)),
        )
        sums = sums_of(self.run.method, self.run.options, self.run.explains)
        client = SumClient(
            self.config.name,
            read_site_key(self.config.work / "signing.pem"),
            {name: bytes.fromhex(key) for name, key in self.config.trust.items()},
            self.folder,
            sums,
            self._own(ticket, check=ticket.step == "MaskedInputCollection"),
            agreed,
        )
        return client.answer(request)

    def _own(self, ticket: Ticket, check: bool) -> Own:
        """What the round's task has left; `check` reads all of it, for the step that uses it."""
        round = ticket.round
        file = self._file(round)
        if not file.exists():
            raise InputError(f"{file}: no such file; the task of round {round} was not done here")
        tensors, facts = load_with_facts(file, check)
        if facts["summed"] != self._summed(ticket):
            raise InputError(
                f"the task of round {round} was for a sum by {facts['summed']}, "
                f"it is asked for by {self._summed(ticket)}"
            )
        parts: dict[str, State] = {part: {} for part in PARTS}
        for key, tensor in tensors.items():
            part, name = key.split("/", 1)
            parts[part][name] = tensor
        state, extras, base = (parts[part] for part in PARTS)
        samples = float(facts["samples"])
        return Own(state, base, samples, extras, facts["explained"], facts["begun"])

    def _summed(self, ticket: Ticket) -> dict[str, Any]:
        """How the run sums: a site's update goes into such a sum alone."""
        fed = self.run.arguments.fed
        return {
            "method": self.run.method.name,
            "options": {name: str(value) for name, value in self.run.options.items()},
            "explains": self.run.explains,
            "least": fed.fed_secure_min,
            "norm": fed.fed_secure_norm,
            "shares": fed.fed_dp_shares,
            "flags": deciding(ticket.flags),
        }

    def _file(self, round: int) -> Path:
        return self.folder / f"{round:04d}.safetensors"
