"""Methods by exact name, and the checks that all of them share."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fed.methods.interface import options as options_of
from fed.methods.interface.calibration import Calibration
from fed.methods.interface.checks import check_not_zero
from fed.methods.interface.client_rule import ClientRule
from fed.state import State, StateError, check, is_finite, near
from llava.errors import InputError

_METHODS: dict[str, Callable[..., Outcome]] = {}

# What a client is sent: (its name, its task, all clients' own states, the shared one, the method's
# memory) -> (the state that it starts from, what goes beside it).
Send = Callable[[str, str, Mapping[str, State], State, State], tuple[State, State]]


@dataclass
class Outcome:
    """What a method returns.

    Attributes:
        state: the shared state, or for a personal method one per client, in `base`'s dtypes.
        memory: what its next call is to be given: a flat dict of tensors, None when nothing.
        facts: what happened, for people and plots; JSON types only.
    """

    state: State | list[State]
    memory: dict[str, torch.Tensor] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def method(
    name: str,
    *,
    personal: bool = False,
    whole: bool = False,
    client: type[ClientRule] | None = None,
    send: Send | None = None,
) -> Callable:
    """Register a function `(states, *, weights, base, memory, <options>) -> Outcome` as `name`.

    The function gets arguments that were checked (see `get`), memory as a dict, no client of weight
    0 unless `personal` (one state per client comes back), and may return any floating type. Unless
    `whole` says otherwise, a layer's result must depend on nothing but its own weight and bias: a
    merge of whole models goes layer by layer.

    A function may ask for `calibration`, what there is to measure of each client's state on data;
    where it gives that no default, the method cannot do without.

    A method whose clients step in another way has a rule `client`, made anew for each turn. Its
    function may ask for `extras`, what each client's rule sent, and `total`, how many clients the
    run has, in this round or not. Any function may ask for `clients`, the names, and `tasks`.

    Clients of other methods are sent their own state, or the shared one; `send` says otherwise.
    """
    sends = client is not None and client.sends

    def register(function: Callable[..., Outcome]) -> Callable[..., Outcome]:
        if name in _METHODS:
            raise InputError(f"two methods are called {name}")
        parameters = inspect.signature(function).parameters
        asked = parameters.keys() & set(options_of.ASKED)
        own = parameters.get("calibration")
        calibrated = own is not None and own.default is own.empty

        @functools.wraps(function)
        @torch.no_grad()
        def run(
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
            **options: Any,
        ) -> Outcome:
            options = options_of.parse(name, function, options)
            who = list(clients or map(str, range(len(states))))
            weights = _check(states, weights, base, who)
            extras = _check_extras(name, extras, base if sends else {}, who)
            tasks = [""] * len(states) if tasks is None else tasks
            if len(tasks) != len(states):
                raise InputError(
                    f"{len(tasks)} tasks, expected one of each of {len(states)} clients"
                )
            total = len(states) if total is None else total
            if total < len(states):
                raise InputError(f"{len(states)} client states of {total} clients in total")
            if calibrated and calibration is None:
                raise InputError(
                    f"{name} needs data to calibrate on, which a merge has "
                    "(--calibration_data) and a round has not"
                )
            heard = [k for k, weight in enumerate(weights) if personal or weight > 0]
            measures = None if calibration is None else [calibration[k] for k in heard]
            beside = {"extras": [extras[k] for k in heard], "total": total, "calibration": measures}
            beside |= {"clients": [who[k] for k in heard], "tasks": [tasks[k] for k in heard]}
            outcome = function(
                [states[k] for k in heard],
                weights=[weights[k] for k in heard],
                base=base,
                memory=dict(memory or {}),
                **{k: v for k, v in beside.items() if k in asked},
                **options,
            )
            if personal:
                for k, state in enumerate(outcome.state):  # one by one: there is one a client
                    outcome.state[k] = _as(base, state, name, copy=True)
            else:
                outcome.state = _as(base, outcome.state, name, copy=False)
            outcome.memory = outcome.memory or None
            outcome.facts["clients"] = [who[k] for k in heard]
            return outcome

        run.client, run.whole, run.personal, run.send = client, whole, personal, send
        run.calibrated = calibrated
        _METHODS[name] = run
        return run

    return register


def names() -> list[str]:
    """All methods, sorted."""
    _load()
    return sorted(_METHODS)


def get(name: str) -> Callable[..., Outcome]:
    """The method `name`, a callable `(states, *, weights, base, memory=None, **options)`.

    It also takes `clients`, names for messages and facts, `extras`, what each client sent beside
    its state where clients do, `total`, how many clients there are (as many as states when not
    given), `calibration`, one a client, and `tasks`, the name of each client's (all have one, "",
    when not given). It changes none of its arguments.

    Its attributes: `client` (the `ClientRule`, or None), `whole`, `personal`, `send` (see `Send`,
    or None), and `calibrated` (whether it needs `calibration`).

    Raises:
        InputError: no such method; and when it is called: weights that are not sample counts, an
            option that it has not or of another type.
        StateError: when it is called: a state that has not the names and shapes of `base` or is
            not finite, memory or extras that do not fit.
    """
    _load()
    if name not in _METHODS:
        known = ", ".join(sorted(_METHODS))
        raise InputError(f"no method is called {name!r}{near(name, _METHODS)}; there are {known}")
    return _METHODS[name]


def parse_options(name: str, options: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Options of method `name` from `["tau=0.3", ...]` or a mapping, as its signature types them.

    Only what is given is returned. `none` means None where the type allows it, `inf` is a float.

    Raises:
        InputError: an unknown option, one given twice, or a value that is not of its type.
    """
    return options_of.parse(name, get(name), options)


def client_rule(
    name: str, options: Sequence[str] | Mapping[str, Any]
) -> Callable[[State, State, State], ClientRule] | None:
    """What makes a client's rule for a turn, `(start, sent, kept) -> ClientRule`.

    None where clients of method `name` step as their trainer does.
    """
    function = get(name)
    if function.client is None:
        return None
    given = options_of.parse(name, function, options)
    return functools.partial(function.client, **{**options_of.defaults(function), **given})


def _load() -> None:
    """Import every file of fed/methods/, and `method.py` of its packages: each registers itself."""
    folder = importlib.import_module("fed.methods").__path__
    for module in pkgutil.iter_modules(folder):
        if module.name != "interface":
            end = ".method" if module.ispkg else ""
            importlib.import_module(f"fed.methods.{module.name}{end}")


def _check(
    states: Sequence[State], weights: Sequence[float], base: State, who: list[str]
) -> list[float]:
    if not states:
        raise InputError("no client states to aggregate")
    if not len(states) == len(weights) == len(who):
        raise InputError(
            f"{len(states)} client states, {len(weights)} weights and {len(who)} client names: "
            "expected one of each per client"
        )
    weights = [float(weight) for weight in weights]
    for client, weight in zip(who, weights, strict=True):
        if not 0 <= weight < math.inf:
            raise InputError(f"client {client} has weight {weight}, expected a number of samples")
    if not 0 < sum(weights) < math.inf:
        raise InputError(f"the clients' weights sum to {sum(weights)}, expected some samples")
    check(base, base, who="the base")
    for client, state in zip(who, states, strict=True):
        check(state, base, who=f"client {client}")
        check_not_zero(state, base, f"client {client}")
    return weights


def _check_extras(
    name: str, extras: Sequence[State] | None, like: State, who: list[str]
) -> Sequence[State]:
    if extras is None:
        if like:
            raise InputError(f"{name} needs extras: what each client sent beside its state")
        return [{}] * len(who)
    if len(extras) != len(who):
        raise InputError(f"{len(extras)} extras, expected one of each of {len(who)} clients")
    for client, extra in zip(who, extras, strict=True):
        check(extra, like, who=f"client {client}, beside its state")
    return extras


def _as(base: State, state: State, method: str, copy: bool) -> State:
    """In `base`'s dtypes and order; `copy` where the tensors may be those of a client."""
    cast = {name: state[name].to(base[name].dtype, copy=copy) for name in base}
    for name, tensor in cast.items():
        if not is_finite(tensor):
            raise StateError(f"{method}: the result's {name} does not fit into {tensor.dtype}")
    return cast
