"""A method: one object that describes an aggregation or a merge."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fed.methods.interface import options
from fed.methods.interface.calibration import Calibration
from fed.methods.interface.checks import check_not_zero
from fed.methods.interface.client_rule import ClientRule
from fed.methods.interface.each import Each
from fed.methods.interface.sums import Sums
from fed.state import State, StateError, check, is_finite
from llava.errors import InputError

# What a client is sent: (its name, its task, all clients' own states, the shared one, the method's
# memory) -> (the state that it starts from, what goes beside it).
Send = Callable[[str, str, Mapping[str, State], State, State], tuple[State, State]]


@dataclass
class Outcome:
    """The result of a method.

    Attributes:
        state: the shared state, or for a personal method one per client, in `base`'s dtypes. Such
            a one is made when it is asked for (`Each`), and is to be read, not changed: its tensors
            may be those of clients, of `base` and of `memory`.
        memory: for the method's next call: a flat dict of tensors, None when nothing.
        facts: for records and plots; JSON types only.
    """

    state: State | Each | list[State]
    memory: dict[str, torch.Tensor] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Method:
    """A callable `(states, *, weights, base, memory=None, **options) -> Outcome`.

    Attributes:
        name: in the registry.
        function: the arithmetic, `(states, *, weights, base, …) -> Outcome`. It gets arguments that
            were checked, no client of weight 0 unless `personal`, and may return any floating type.
            It declares what it uses: `memory` between rounds, a dict; `clients`, the names;
            `tasks`, the clients' tasks; `extras`, the tensors that each client's rule sent;
            `total`, the number of clients in the run; `calibration`, one a client, required where
            it has no default. All other keyword arguments are its options.
        personal: whether one state per client comes back.
        cross_layer: whether a layer's result depends on more than its own weight and bias. A merge
            of whole models goes layer by layer where it does not.
        explained_by: the option and its value with which clients weigh by what their pictures
            explain (`fed.server.reliability`), as with --fed_weighting explained.
        client_rule: a rule for the clients' steps, made anew for each task; None: they just train.
        send: what a client is sent, where that is not its own state or the shared one.
        exchanges: --fed_rounds -> the number of times that clients send something back.
        sums: its two sides where it needs only sums over clients; None: it looks at single ones.
        connector: the --mm_projector_type that it needs, and that needs it.
        flags: a dataclass of command-line flags of its own; all of them decide the result.
        prepare: refuses arguments that do not go together, `(specs, arguments) -> arguments`, and
            returns them as the run has them.
        store: what clients keep to themselves, `(model, part, run) -> ClientStore`.
        personalise: fits a new client to a finished run, `(command line, read) -> None`; `read`
            gives the run's state of its file.
    """

    name: str
    function: Callable[..., Outcome]
    personal: bool = False
    cross_layer: bool = False
    explained_by: tuple[str, Any] | None = None
    client_rule: type[ClientRule] | None = None
    send: Send | None = None
    exchanges: Callable[[int], int] = lambda rounds: rounds
    sums: type[Sums] | None = None
    connector: str | None = None
    flags: type | None = None
    prepare: Callable[[Sequence[Any], Any], Any] | None = None
    store: Callable[..., Any] | None = None
    personalise: Callable[..., None] | None = None

    @functools.cached_property
    def options(self) -> dict[str, options.Option]:
        """Options by name."""
        return options.options_of(self.name, self.function)

    @property
    def defaults(self) -> dict[str, Any]:
        """The default of each option."""
        return {name: option.default for name, option in self.options.items()}

    @functools.cached_property
    def arguments(self) -> Mapping[str, inspect.Parameter]:
        """The parameters of the function."""
        return inspect.signature(self.function).parameters

    @property
    def takes_calibration(self) -> bool:
        """Whether it has a use for data to calibrate on."""
        return "calibration" in self.arguments

    @property
    def needs_calibration(self) -> bool:
        """Whether it cannot do without."""
        calibration = self.arguments.get("calibration")
        return calibration is not None and calibration.default is calibration.empty

    def asks_explained(self, given: Mapping[str, Any]) -> bool:
        """Whether, with these options, clients weigh by what their pictures explain."""
        if self.explained_by is None:
            return False
        option, value = self.explained_by
        return {**self.defaults, **given}[option] == value

    def summed(self, given: Mapping[str, Any]) -> Sums:
        """Its two sides where the server gets only sums over clients.

        Raises:
            InputError: it looks at single clients, or does with these options.
        """
        if self.sums is None:
            raise InputError(f"{self.name} looks at single clients: sums over them do not do")
        sums = self.sums(self, given)
        if why := sums.refusal():
            raise InputError(f"{self.name} needs more than sums over clients: {why}")
        return sums

    @property
    def merges(self) -> bool:
        """Whether it has a meaning outside rounds: one state comes out, and clients do nothing."""
        return not self.personal and self.client_rule is None

    @property
    def sends_extras(self) -> bool:
        """Whether clients send something beside their state."""
        return self.client_rule is not None and self.client_rule.sends

    def parse(self, given: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
        """Options from `["tau=0.3", …]` or a mapping, typed and in range.

        Only what is given is returned. `none` means None where the type allows it, `inf` is a
        float.

        Raises:
            InputError: an unknown option, one given twice, or a value that does not fit.
        """
        return options.parse(self.name, self.options, given)

    def rule(
        self, given: Sequence[str] | Mapping[str, Any]
    ) -> Callable[[State, State, State], ClientRule] | None:
        """The maker of a client's rule for a task, `(start, sent, kept) -> ClientRule`, or None."""
        if self.client_rule is None:
            return None
        return functools.partial(self.client_rule, **{**self.defaults, **self.parse(given)})

    @torch.no_grad()
    def __call__(
        self,
        states: Sequence[State],
        *,
        weights: Sequence[float],
        base: State,
        memory: Mapping[str, torch.Tensor] | None = None,
        clients: Sequence[str] | None = None,
        extras: Sequence[State] | None = None,
        total: int | None = None,
        calibration: Sequence[Calibration] | None = None,
        tasks: Sequence[str] | None = None,
        **given: Any,
    ) -> Outcome:
        """One state out of several, or one for each; none of the arguments is changed.

        Args:
            clients: names, for messages and facts.
            extras: what each client sent beside its state, where clients do.
            total: how many clients there are; as many as states when not given.
            calibration: one a client.
            tasks: the name of each client's; all have one, "", when not given.

        Raises:
            InputError: weights that are not sample counts, an option that it has not or that does
                not fit.
            StateError: a state that has not the names and shapes of `base` or is not finite, memory
                or extras that do not fit.
        """
        parsed = self.parse(given)
        names = list(clients or map(str, range(len(states))))
        counts = _check(states, weights, base, names)
        per_client = {
            "clients": names,
            "extras": self._check_extras(extras, base, names),
            "tasks": _check_tasks(tasks, len(states)),
            "calibration": self._check_calibration(calibration),
        }
        counted = [k for k, weight in enumerate(counts) if self.personal or weight > 0]
        arguments = {
            "memory": dict(memory or {}),
            "total": _check_total(total, len(states)),
            **{name: of and [of[k] for k in counted] for name, of in per_client.items()},
        }
        outcome = self.function(
            [states[k] for k in counted],
            weights=[counts[k] for k in counted],
            base=base,
            **{name: value for name, value in arguments.items() if name in self.arguments},
            **parsed,
        )
        outcome = self.finished(outcome, base)
        outcome.facts["clients"] = [names[k] for k in counted]
        return outcome

    def _check_extras(
        self, extras: Sequence[State] | None, base: State, names: list[str]
    ) -> Sequence[State]:
        like = base if self.sends_extras else {}
        if extras is None:
            if like:
                raise InputError(
                    f"{self.name} needs extras: what each client sent beside its state"
                )
            return [{}] * len(names)
        if len(extras) != len(names):
            raise InputError(f"{len(extras)} extras, expected one of each of {len(names)} clients")
        for client, extra in zip(names, extras, strict=True):
            check(extra, like, who=f"client {client}, beside its state")
        return extras

    def _check_calibration(
        self, calibration: Sequence[Calibration] | None
    ) -> Sequence[Calibration] | None:
        if self.needs_calibration and calibration is None:
            raise InputError(
                f"{self.name} needs data to calibrate on, which a merge has "
                "(--calibration_data) and a round has not"
            )
        return calibration

    def finished(self, outcome: Outcome, base: State) -> Outcome:
        """The outcome in `base`'s dtypes and order; StateError if it does not fit into them."""
        outcome.state = self._cast(outcome.state, base)
        outcome.memory = outcome.memory or None
        return outcome

    def _cast(self, state: State | Each | list[State], base: State) -> State | Each:
        """What the function returned, in `base`'s dtypes and order; one by one where it is many."""
        if isinstance(state, dict):
            return self._as(base, state)
        return Each(len(state), lambda k: self._as(base, state[k]))

    def _as(self, base: State, state: State) -> State:
        cast = {name: state[name].detach().to(base[name].dtype) for name in base}
        for name, tensor in cast.items():
            if not is_finite(tensor):
                raise StateError(
                    f"{self.name}: the result's {name} does not fit into {tensor.dtype}"
                )
        return cast


def _check_tasks(tasks: Sequence[str] | None, count: int) -> Sequence[str]:
    tasks = [""] * count if tasks is None else tasks
    if len(tasks) != count:
        raise InputError(f"{len(tasks)} tasks, expected one of each of {count} clients")
    return tasks


def _check_total(total: int | None, count: int) -> int:
    total = count if total is None else total
    if total < count:
        raise InputError(f"{count} client states of {total} clients in total")
    return total


def _check(
    states: Sequence[State], weights: Sequence[float], base: State, names: list[str]
) -> list[float]:
    if not states:
        raise InputError("no client states to aggregate")
    if not len(states) == len(weights) == len(names):
        raise InputError(
            f"{len(states)} client states, {len(weights)} weights and {len(names)} client names: "
            "expected one of each per client"
        )
    weights = [float(weight) for weight in weights]
    for client, weight in zip(names, weights, strict=True):
        if not 0 <= weight < math.inf:
            raise InputError(f"client {client} has weight {weight}, expected a number of samples")
    if not 0 < sum(weights) < math.inf:
        raise InputError(f"the clients' weights sum to {sum(weights)}, expected some samples")
    check(base, base, who="the base")
    for client, state in zip(names, states, strict=True):
        check(state, base, who=f"client {client}")
        check_not_zero(state, base, f"client {client}")
    return weights
