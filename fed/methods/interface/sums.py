"""Methods that need only sums over clients: all that a server learns where sums are secure.

Such a method has, beside its function, a class of `Sums`. A round is then one exchange or more: the
server gives tensors, every client answers with terms that are its own state's, and the server gets
the sums of the terms and no single one. The outcome is the function's on the same states.

A client's weight is a factor of its terms and is in no message: the server learns the sum of all
weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from fed.numerics.chunks import empty
from fed.state import State, fingerprints

if TYPE_CHECKING:
    from fed.methods.interface.method import Method, Outcome

WEIGHT, COUNT = "weight", "clients"  # the terms that are a client's weight, and 1
STATE, EXTRAS = "state/", "extras/"  # how the terms of what a client sends begin


@dataclass(frozen=True)
class Group:
    """Clients whose terms make a sum by itself, and what they are given for it.

    `base` is what all of them have begun with, of the names that `Sums.common` gives.
    """

    given: State
    clients: Sequence[str]
    base: State


class Groups(dict[str, Group]):
    """An exchange of several sums, by name; a client is in one of them at most."""


@dataclass(frozen=True)
class Summed:
    """A group's sums, and the clients that are in them: who vanished is not."""

    sums: State
    clients: Sequence[str]


# Yields what the server gives to all for an exchange, or groups; is sent the sums, or `Summed` of
# each group by its name; and returns the outcome.
Given: TypeAlias = "State | Groups"
Exchanges: TypeAlias = "Generator[Given, Any, Outcome]"


def given_too(given: Given, more: State) -> Given:
    """What is given for an exchange, and more."""
    if isinstance(given, Groups):
        return Groups((name, replace(of, given=of.given | more)) for name, of in given.items())
    return given | more


@dataclass(frozen=True)
class Own:
    """What a client has after its task.

    Attributes:
        state: as it would be sent.
        base: the state that it began with.
        weight: its number of samples.
        extras: what its rule sends beside the state.
        explained: [H, H + I, spread], what its pictures explain, where that was measured.
        begun: `begun_with` of the base and what was sent beside it; None: of the base alone.
    """

    state: State
    base: State
    weight: float
    extras: State = field(default_factory=dict)
    explained: Sequence[float] | None = None
    begun: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Round:
    """The server's side.

    Attributes:
        base: the state that all began with.
        memory: the method's.
        clients: how many are asked, of `total` in the run.
        names, tasks: theirs, where the method is one of tasks.
        sent: what all were sent beside the base.
    """

    base: State
    memory: Mapping[str, Tensor]
    clients: int
    total: int
    names: Sequence[str] = ()
    tasks: Sequence[str] = ()
    sent: State = field(default_factory=dict)


class Sums(ABC):
    """A method's two sides of a round, for its options.

    Attributes:
        by_task: whether there are sums over the clients of one task.
    """

    by_task: ClassVar[bool] = False

    def __init__(self, method: Method, options: Mapping[str, Any]):
        self.method, self.options = method, {**method.defaults, **method.parse(options)}

    @property
    def most_exchanges(self) -> int:
        """How many exchanges a round has at most: a client answers no more."""
        return 1

    @abstractmethod
    def terms(self, exchange: int, own: Own, given: State) -> State:
        """A client's terms of exchange 0, 1, …, by names that all share; what is one number has
        shape (1,)."""

    def common(self, exchange: int, names: Collection[str]) -> Collection[str]:
        """Of what clients have begun with, the names of what is the same for all in one sum.

        Args:
            names: of `begun_with`.
        """
        return names

    def bound(self, name: str, weight: float, norm: float) -> float:
        """How large a value of the term `name` can be, for the range of secure sums.

        Args:
            weight: the largest that a client may have.
            norm: the largest Euclidean norm of what a client sends, or of one layer of it.
        """
        return {WEIGHT: weight, COUNT: 1.0}.get(name, weight * norm)

    @abstractmethod
    def serve(self, round: Round) -> Exchanges:
        """The server's side. What it yields is given to the clients; it is sent the sums."""

    def exchanges(self, round: Round) -> Exchanges:
        """`serve`, with the outcome in the base's types."""
        outcome = yield from self.serve(round)
        return self.method.finished(outcome, round.base)

    def refusal(self) -> str | None:
        """Why these options need more than sums; the rest of a sentence. None: they do not."""
        return None


class MeanOnly(Sums):
    """Methods of which the mean is all that matters, by weight or of equal clients.

    The function is called on as many clients as took part, all alike, each the mean.
    """

    def terms(self, exchange: int, own: Own, given: State) -> State:
        weight = 1.0 if self.equal else own.weight
        parts = {STATE: differences(own.state, own.base), EXTRAS: own.extras}
        return weighted(parts, weight)

    def serve(self, round: Round) -> Exchanges:
        sums = yield {}
        moved, extras = parts_of(sums, STATE, EXTRAS)
        count = number_of(sums[COUNT])
        weight = float(sums[WEIGHT]) / count
        mean = empty(round.base)
        for name, tensor in moved.items():
            mean[name].copy_(round.base[name].double() + tensor)
        return self.method(
            [mean] * count,
            weights=[weight] * count,
            base=round.base,
            memory=round.memory or None,
            extras=[extras] * count if extras else None,
            total=round.total,
            **self.options,
        )

    @property
    def equal(self) -> bool:
        """Whether clients count alike, whatever their weights."""
        return bool(self.options.get("paper_compat") or self.options.get("weighting") == "uniform")


def begun_with(base: State, sent: State | None = None) -> dict[str, str]:
    """The digests of what a client begins a task with: its state, and what is sent beside it."""
    return fingerprints(base | {f"{EXTRAS}{name}": tensor for name, tensor in (sent or {}).items()})


def differences(state: State, base: State) -> State:
    """What a client changed, float64."""
    return {name: state[name].double() - tensor.double() for name, tensor in base.items()}


def weighted(parts: Mapping[str, State], weight: float) -> State:
    """Terms: each part's tensors times the weight, by its beginning, and the weight itself."""
    terms = {WEIGHT: torch.tensor([weight], dtype=torch.float64)}
    terms[COUNT] = torch.ones_like(terms[WEIGHT])
    for beginning, tensors in parts.items():
        terms |= {beginning + name: weight * t.double() for name, t in tensors.items()}
    return terms


def number_of(counted: Tensor) -> int:
    """How many clients a sum of `COUNT` is of."""
    return round(float(counted))


def parts_of(sums: State, *beginnings: str) -> list[State]:
    """The parts of a sum of `weighted` terms, divided by the sum of the weights."""
    weight = float(sums[WEIGHT])
    return [
        {
            name.removeprefix(beginning): tensor / weight
            for name, tensor in sums.items()
            if name.startswith(beginning)
        }
        for beginning in beginnings
    ]
