"""A driver runs the tasks of clients. One file, one driver, found by its name."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, cast

from fed.arguments import Arguments
from fed.clients.clients_yaml import ClientSpec
from fed.clients.store import ClientStore
from fed.clients.task import ClientTask, Log, Result
from fed.drivers.worker_group import WorkerGroup
from fed.methods import Method
from fed.state import State
from llava.errors import InputError
from llava.model.trainable_part import TrainablePart
from llava.plugins import import_modules
from llava.suggest import did_you_mean
from llava.train.arguments import DataArguments, TrainingArguments
from llava.train.session import Session

if TYPE_CHECKING:  # `fed.privacy` needs an extra
    from fed.clients.sum_client import Agreed
    from fed.clients.sums_here import Summing
    from fed.methods.interface.sums import Sums

_DRIVERS: dict[str, type[Driver]] = {}

Flags = TypeVar("Flags")


class Participant(Protocol):
    """A client, as much as the round loop knows of it."""

    name: str

    def samples(self, round: int) -> int:
        """The number of samples that round `round` (from 1) trains on."""


@dataclass(frozen=True)
class Run:
    """The description of a run, from which a driver is built.

    Attributes:
        specs: the clients of clients.yaml.
        arguments: the command line's.
        client_args: the same with each client's own flags.
        method, options: the aggregation method.
        log_of: a client's name -> the taker of its logs.
        group: the processes that train clients of their own.
    """

    specs: Sequence[ClientSpec]
    arguments: Arguments
    client_args: Sequence[tuple[DataArguments, TrainingArguments]]
    method: Method
    options: Mapping[str, Any]
    log_of: Callable[[str], Log]
    group: WorkerGroup = field(default_factory=WorkerGroup)

    @property
    def rounds(self) -> int:
        """The number of times that clients send something back."""
        return self.method.exchanges(self.arguments.fed.fed_rounds)

    @property
    def explains(self) -> bool:
        """Whether clients measure, after a task, what their pictures explain of their captions."""
        fed = self.arguments.fed
        asked = fed.fed_weighting == "explained" or self.method.asks_explained(self.options)
        return asked and not fed.fed_pool

    def flags(self, kind: type[Flags]) -> Flags:
        """The flags of a driver or a method, from the command line."""
        names = [field.name for field in dataclasses.fields(cast(Any, kind))]
        return kind(**{name: getattr(self.arguments.fed, name) for name in names})

    @property
    def main(self) -> bool:
        """Whether this process writes what its trainer has; of a group each does."""
        return self.arguments.training.process_index == 0

    @property
    def output_dir(self) -> Path:
        """--output_dir."""
        return Path(self.arguments.training.output_dir)


class Driver(ABC):
    """Clients with their data, and what runs their tasks.

    Attributes:
        keys: those that it adds to a client's in clients.yaml; `read_keys` reads them.
        flags: a dataclass of command-line flags of its own; `fed/drivers/flags.py` has those that
            drivers share.
        lr_schedule: the default of --fed_lr_schedule.
        trains_here: whether clients step in this process, on its model: then a method may change
            their steps and keep parameters with them, and --fed_pool has a meaning.
        clients_keep: whether clients step in this package's own processes elsewhere, and what they
            keep from task to task stays there, with --fed_secure their updates, too: a method may
            do what it may where `trains_here`.
        hands_over: whether clients are processes that are given what they keep from task to task
            (`ClientStore.given`), and give it back: a method may have private parameters.
        data_here: whether the clients' data lie on this machine, where clients.yaml says.
        may_fail: whether a client that fails need not end the run; then --fed_min_clients has a
            meaning.
        writes_updates: whether it writes every update that it gives into `task.update_file`, in
            each process; else one process does, and the others wait for it.
        clients: all clients, in a fixed order.
        datasets: the records of each client of clients.yaml.
        part: what trains.
        initial: the state that the first round starts from.
        session: the model in this process; None where none is needed.
        store: what clients keep to themselves.
    """

    keys: ClassVar[tuple[str, ...]] = ()
    flags: ClassVar[type | None] = None
    lr_schedule: ClassVar[str] = "run"
    trains_here: ClassVar[bool] = False
    clients_keep: ClassVar[bool] = False
    hands_over: ClassVar[bool] = False
    data_here: ClassVar[bool] = True
    may_fail: ClassVar[bool] = False
    writes_updates: bool = False

    clients: Sequence[Participant]
    datasets: Sequence[Sized]
    part: TrainablePart
    initial: State
    session: Session | None
    store: ClientStore

    @abstractmethod
    def __init__(self, run: Run): ...

    @abstractmethod
    def run(
        self, tasks: Sequence[ClientTask], go_on: Callable[[], bool]
    ) -> Generator[tuple[ClientTask, Result], None, None]:
        """Run tasks, in any order, and give each result when it is there.

        A `ClientError` may be given for an update; any other exception ends the run. `go_on()` is
        asked before a task is begun: when it says no, those at work are finished and no more begun.
        A driver that has an update as a file moves it to `task.update_file` itself, and gives what
        `load_update` makes of it.
        """

    def drawn_from(self, round: int) -> list[Participant]:
        """The clients among which --fed_clients_per_round draws: those with samples in the round.

        It must be the same whenever the round is begun again.
        """
        return [client for client in self.clients if client.samples(round) > 0]

    @property
    def common_settings(self) -> str:
        """A digest of the flags that clients elsewhere all train with."""
        return ""

    def summing(
        self,
        folder: Path,
        tasks: Sequence[ClientTask],
        sums: Sums,
        agreed: Agreed,
        explained: Mapping[str, Sequence[float]],
    ) -> Summing:
        """The clients of tasks that are done, for the secure sums of their round.

        Args:
            folder: of the run, for what clients on this machine remember of their sums.
            explained: [H, H + I, spread] by client, where their pictures are measured here.
        """
        from fed.clients.sums_here import SumsHere

        return SumsHere(folder, tasks, sums, agreed, explained)

    @classmethod
    def command_line(cls, argv: list[str]) -> list[str]:
        """The run's command line as this driver needs it, before it is parsed."""
        return argv

    @classmethod
    def join(cls, argv: list[str]) -> WorkerGroup:
        """The processes that train side by side; called before torch has a process group."""
        return WorkerGroup()

    @classmethod
    def read_keys(cls, entry: Mapping[str, Any], folder: Path, where: str) -> Any:
        """The driver's part of a client's entry in clients.yaml, for `ClientSpec.driver`.

        Args:
            folder: of clients.yaml.
            where: opens the message of an `InputError`.
        """
        return None

    @classmethod
    def settings_of(cls, spec: ClientSpec) -> dict[str, Any]:
        """Those of a client's own keys that decide the result; JSON types."""
        return {}

    def close(self) -> None:  # noqa: B027
        """End what was started for the run; nothing is asked of the driver any more."""


def driver(name: str) -> Callable[[type[Driver]], type[Driver]]:
    """Register a driver for --fed_driver `name`."""

    def register(kind: type[Driver]) -> type[Driver]:
        if name in _DRIVERS:
            raise InputError(f"two drivers are called {name}")
        _DRIVERS[name] = kind
        return kind

    return register


def names() -> list[str]:
    """All drivers, sorted."""
    import_modules("fed.drivers")
    return sorted(_DRIVERS)


def get(name: str) -> type[Driver]:
    """The driver `name`; `InputError` if there is none."""
    import_modules("fed.drivers")
    if name not in _DRIVERS:
        known = ", ".join(sorted(_DRIVERS))
        raise InputError(
            f"--fed_driver is {name!r}{did_you_mean(name, _DRIVERS)}; known are {known}"
        )
    return _DRIVERS[name]
