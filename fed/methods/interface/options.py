"""Options of a method: its keyword arguments, as text from the command line or values from YAML."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Any, Literal

from fed.state import near
from llava.errors import InputError

# Every method has the first four; ASKED are for those that ask for them. All others are options.
ASKED = ("extras", "total", "calibration", "clients", "tasks")
ARGUMENTS = ("states", "weights", "base", "memory", *ASKED)
_EXPECTED = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}


def parse(
    name: str, function: Callable, options: Sequence[str] | Mapping[str, Any]
) -> dict[str, Any]:
    """See `fed.methods.parse_options`; `function` is the one registered as `name`."""
    if not isinstance(options, Mapping):
        options = _pairs(name, options)
    function = inspect.unwrap(function)
    types = typing.get_type_hints(function)
    known = [n for n in inspect.signature(function).parameters if n not in ARGUMENTS]
    for option in options:
        if option not in known:
            has = f"it has {', '.join(known) or 'none'}"
            raise InputError(f"{name} has no option {option!r}{near(option, known)}; {has}")
    return {o: _typed(f"{name} option {o}", value, types[o]) for o, value in options.items()}


def defaults(function: Callable) -> dict[str, Any]:
    """What each option of a method is when it is not given."""
    parameters = inspect.signature(inspect.unwrap(function)).parameters
    return {name: p.default for name, p in parameters.items() if name not in ARGUMENTS}


def _pairs(name: str, texts: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        option, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"{name} option {text!r}: expected name=value")
        if option in pairs:
            raise InputError(f"{name} option {option} is given twice")
        pairs[option] = value
    return pairs


def _typed(what: str, value: Any, kind: Any) -> Any:
    """`value` as float, int, bool, str or Literal, or None; text is read, others must fit."""
    optional = NoneType in typing.get_args(kind)
    if optional:
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        kind = next(k for k in typing.get_args(kind) if k is not NoneType)
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value in choices:
            return value
        expected = f"one of {', '.join(choices)}"
    else:
        try:
            return _read(value, kind)
        except (KeyError, ValueError):
            expected = _EXPECTED[kind]
    expected += " or none" if optional else ""
    raise InputError(f"{what}: expected {expected}, found {value!r}")


def _read(value: Any, kind: type) -> Any:
    if isinstance(value, str):
        value = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
    elif kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or value != value:
        raise ValueError("of another type, or NaN")
    return value
