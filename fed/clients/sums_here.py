"""Clients whose updates lie on this machine, in secure sums.

They run the protocol as sites do, with keys and memories of their own, so that a run can be tried
before sites join it. It hides nothing here: who runs the driver has the updates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from fed.clients.sum_client import Agreed, SumClient, SumRequest
from fed.clients.task import ClientError, ClientTask
from fed.clients.update import load_update
from fed.methods.interface.sums import Own, Sums, begun_with
from llava.errors import InputError


class Summing(Protocol):
    """The clients of a round, as secure sums ask them."""

    @property
    def keys(self) -> Mapping[str, bytes]:
        """The public key of each, by name."""

    def ask(
        self, requests: Mapping[str, SumRequest]
    ) -> Iterator[tuple[str, bytes | bytearray | ClientError]]:
        """Each client's answer as it comes, or why there is none."""


class SumsHere:
    """`Summing` of the clients of `tasks`.

    Args:
        folder: where the clients' keys and memories are made, until the run is over.
        explained: what the pictures of each client explain, where that is measured.
    """

    def __init__(
        self,
        folder: Path,
        tasks: Sequence[ClientTask],
        sums: Sums,
        agreed: Agreed,
        explained: Mapping[str, Sequence[float]],
    ):
        from fed.privacy.keys import make_site_key, read_site_key

        self.folder, self.sums, self.agreed, self.explained = folder, sums, agreed, explained
        self._tasks = {task.name: task for task in tasks}
        self._begun: dict[str, dict[str, str]] = {}
        files = {name: folder / name / "signing.pem" for name in self._tasks}
        for file in files.values():
            if not file.exists():
                make_site_key(file)
        self._keys = {name: read_site_key(file) for name, file in files.items()}
        self.keys = {n: key.public_key().public_bytes_raw() for n, key in self._keys.items()}

    def ask(
        self, requests: Mapping[str, SumRequest]
    ) -> Iterator[tuple[str, bytes | bytearray | ClientError]]:
        for name, request in requests.items():
            try:
                yield name, self._client(name).answer(request)
            except InputError as error:
                yield name, ClientError(str(error))

    def _client(self, name: str) -> SumClient:
        task = self._tasks[name]
        update = load_update(task.update_file, check=False)
        explained = self.explained.get(name)
        if name not in self._begun:
            self._begun[name] = begun_with(task.state, task.extras)
        own = Own(
            update.state,
            task.state,
            float(update.num_samples),
            update.extras,
            explained,
            self._begun[name],
        )
        key, place = self._keys[name], self.folder / name
        return SumClient(name, key, self.keys, place, self.sums, own, self.agreed)
