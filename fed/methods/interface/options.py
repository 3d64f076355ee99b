"""Options of a method: its keyword arguments, as text from the command line or values from YAML."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, Literal

from llava.errors import InputError
from llava.flags import pairs
from llava.suggest import did_you_mean

# Every method has the first three; the others are for those that ask for them. All else is options.
ARGUMENTS = (
    *("states", "weights", "base"),
    *("memory", "extras", "total", "calibration", "clients", "tasks"),
)
_EXPECTED = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Range:
    """The values that an option may have, as `Annotated[float, Range("(0, 1]", "a share")]`.

    Args:
        interval: of numbers, with square brackets where the end belongs to it; ends may be inf.
        says: ends the sentence "… expected"; the interval itself when not given.
    """

    interval: str
    says: str = ""

    def __contains__(self, value: float) -> bool:
        low, high = map(float, self.interval[1:-1].split(", "))
        above = value > low or (self.interval[0] == "[" and value == low)
        return above and (value < high or (self.interval[-1] == "]" and value == high))

    def __str__(self) -> str:
        return self.says or f"in {self.interval}"


Positive = Annotated[float, Range("(0, inf)", "a positive number")]
NonNegative = Annotated[float, Range("[0, inf)", "0 or more")]
Share = Annotated[float, Range("(0, 1]", "a share in (0, 1]")]
Unit = Annotated[float, Range("[0, 1]")]
Decay = Annotated[float, Range("[0, 1)", "a number in [0, 1)")]
Count = Annotated[int, Range("[1, inf)", "at least 1")]
Natural = Annotated[int, Range("[0, inf)", "0 or more")]


@dataclass(frozen=True)
class Option:
    """One option: its type, one of float, int, bool, str or a Literal, and what it may be.

    `what` opens messages: `ties option density`.
    """

    what: str
    kind: Any
    optional: bool
    range: Range | None
    default: Any

    @property
    def expected(self) -> str:
        """The end of the sentence that refuses a value."""
        if typing.get_origin(self.kind) is Literal:
            text = f"one of {', '.join(typing.get_args(self.kind))}"
        else:
            text = _EXPECTED[self.kind]
        return text + (" or none" if self.optional else "")

    @property
    def allowed(self) -> str:
        """The values that it may have, in words."""
        if self.range is None:
            return self.expected
        return f"{self.range}{', or none' if self.optional else ''}"

    def parse(self, value: Any) -> Any:
        """`value` as the option's type; text is read, others must fit.

        Raises:
            InputError: another type, or out of range.
        """
        if self.optional and (
            value is None or (isinstance(value, str) and value.lower() == "none")
        ):
            return None
        try:
            value = _read(value, self.kind)
        except (KeyError, ValueError):
            raise InputError(f"{self.what}: expected {self.expected}, found {value!r}") from None
        if self.range is not None and value not in self.range:
            raise InputError(f"{self.what}: expected {self.allowed}, found {value}")
        return value


def options_of(name: str, function: Callable) -> dict[str, Option]:
    """The options of the function that is registered as `name`, in its order."""
    types = typing.get_type_hints(function, include_extras=True)
    return {
        option: _option(f"{name} option {option}", types[option], parameter.default)
        for option, parameter in inspect.signature(function).parameters.items()
        if option not in ARGUMENTS
    }


def parse(
    name: str, known: Mapping[str, Option], given: Sequence[str] | Mapping[str, Any]
) -> dict[str, Any]:
    """The options that are given, typed; see `Method.parse`."""
    given = given if isinstance(given, Mapping) else pairs(f"{name} options", given)
    for option in given:
        if option not in known:
            has = f"it has {', '.join(known) or 'none'}"
            raise InputError(f"{name} has no option {option!r}{did_you_mean(option, known)}; {has}")
    return {option: known[option].parse(value) for option, value in given.items()}


def _option(what: str, kind: Any, default: Any) -> Option:
    optional = NoneType in typing.get_args(kind)
    if optional:
        kind = next(k for k in typing.get_args(kind) if k is not NoneType)
    bounds = None
    if typing.get_origin(kind) is Annotated:
        kind, bounds = typing.get_args(kind)
    return Option(what, kind, optional, bounds, default)


def _read(value: Any, kind: Any) -> Any:
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise ValueError("none of the choices")
        return value
    if isinstance(value, str):
        value = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
    elif kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or value != value:
        raise ValueError("of another type, or NaN")
    return value
