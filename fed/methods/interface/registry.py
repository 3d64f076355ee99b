"""Methods by exact name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fed.methods.interface.method import Method, Outcome
from llava.errors import InputError
from llava.plugins import import_modules
from llava.suggest import did_you_mean

_METHODS: dict[str, Method] = {}


def method(name: str, **properties: Any) -> Callable[[Callable[..., Outcome]], Method]:
    """Register a function as the method `name`; `properties` are the attributes of `Method`."""

    def register(function: Callable[..., Outcome]) -> Method:
        if name in _METHODS:
            raise InputError(f"two methods are called {name}")
        _METHODS[name] = Method(name, function, **properties)
        return _METHODS[name]

    return register


def names() -> list[str]:
    """All methods, sorted."""
    _load()
    return sorted(_METHODS)


def get(name: str) -> Method:
    """The method `name`; `InputError` with the near names if there is none."""
    _load()
    if name not in _METHODS:
        known = ", ".join(sorted(_METHODS))
        raise InputError(
            f"no method is called {name!r}{did_you_mean(name, _METHODS)}; there are {known}"
        )
    return _METHODS[name]


def _load() -> None:
    """Every file of fed/methods/, and `method.py` of its packages, registers itself."""
    import_modules("fed.methods", without="interface", main="method")
