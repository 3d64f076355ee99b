"""Private training of a run's clients: what each one's records are promised, and how tasks keep it.

A client's records enter the steps of its own tasks alone. With one pass each record is in one
slice, and so in one step of the whole run; else it enters a step in every round and pass. The sum
over a client's tasks is what its guarantee is of, for all of its updates together, whoever sees
them.

A client's secret of the noise is OUTPUT/noise/NAME.json, on the machine where it trains: a site's
own, under --fed_driver remote. Beside it stands the state that each round began from: a server that
asked for a round again from another state would be given a second look at the same records, and is
refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Protocol

from fed.clients.task import ClientTask
from fed.drivers.driver import Run
from fed.drivers.noise_shares import check_slices
from fed.state import fingerprint
from llava.train.arguments import TrainingArguments
from llava.train.private_accounting import Guarantee, guarantee
from llava.train.private_arguments import samples_of_step
from llava.train.private_noise import FOLDER, NoiseSecret
from llava.train.private_run import passes
from llava.train.private_statement import sentence
from llava.train.private_trainer import PrivateSteps

logger = logging.getLogger(__name__)


class Sliced(Protocol):
    """A client, as much of it as is counted: its slices by round, of its own records."""

    name: str
    slices: list[list[int]]


def entries_of(args: TrainingArguments, slices: Iterable[Sequence[int]]) -> int:
    """The most steps that one of a client's records enters in the run.

    A client that is not drawn for a round sees nothing in it, and less is revealed than is stated.
    """
    counts: Counter[int] = Counter()
    for indices in slices:
        often = passes(args, len(indices))
        counts.update(dict.fromkeys(indices, often))
    return max(counts.values(), default=1)


def guarantees(
    run: Run, clients: Sequence[Sliced], datasets: Sequence[Sized]
) -> dict[str, Guarantee]:
    """What the records of each client are promised, by its name.

    Args:
        clients: those of the run, or the pool of all; one without slices is not there yet.

    Raises:
        InputError: delta is above 1 / records of a client, which is named.
    """
    fed = run.arguments.fed
    shares = fed.fed_secure_min if fed.fed_dp_shares else 1
    if fed.fed_pool:
        args, sizes = [run.arguments.training], [sum(map(len, datasets))]
    else:
        args, sizes = [own for _, own in run.client_args], list(map(len, datasets))
    if fed.fed_dp_shares:
        for client, own in zip(clients, args, strict=True):
            check_slices(client.name, client.slices, own)
    return {
        client.name: guarantee(
            fed,
            entries=entries_of(own, client.slices),
            records=size,
            step=samples_of_step(own),
            who=f"client {client.name}",
            shares=shares,
        )
        for client, own, size in zip(clients, args, sizes, strict=True)
        if client.slices
    }


class PrivateClients:
    """The private steps of clients that train in this process.

    Args:
        stated: by client.
        folder: the run's, on this machine.
        flags: by client, those that decide its steps; with others it would draw fresh noise over
            the same records.
    """

    def __init__(
        self,
        stated: Mapping[str, Guarantee],
        folder: Path,
        flags: Mapping[str, Mapping[str, str]],
    ):
        self.stated, self.folder, self.flags = stated, folder / FOLDER, flags
        for name, of in stated.items():
            logger.info("%s", sentence(f"client {name}", of))

    def steps(self, task: ClientTask) -> PrivateSteps:
        """How the task's steps are made private.

        Raises:
            InputError: the round has begun before from another state, or the run with other
                slices, flags or another noise.
        """
        of = self.stated[task.name]
        secret = NoiseSecret(self.folder / f"{task.name}.json")
        flags = dict(self.flags[task.name])
        plan = json.dumps([task.client.slices, of.as_json(), flags], sort_keys=True)
        secret.begin("the run", hashlib.sha256(plan.encode()).hexdigest())
        title = f"round {task.round} of client {task.name}"
        parts = (task.state, task.extras, task.kept)
        secret.begin(title, " ".join(fingerprint(part) for part in parts))
        return PrivateSteps(of.clip, of.own_noise, secret, title)
