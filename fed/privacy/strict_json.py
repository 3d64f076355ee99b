"""JSON from others: of a bounded length, without doubled keys, and each field of one exact form."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from llava.errors import InputError


def read_object(data: Any, most: int, who: str) -> dict[str, Any]:
    """A JSON object in at most `most` bytes; `InputError` otherwise, which `who` opens."""
    if len(data) > most:
        raise InputError(f"{who}: has {len(data)} bytes, expected {most} at most")
    try:
        value = json.loads(
            bytes(data).decode(), object_pairs_hook=_once, parse_constant=_no_constant
        )
    except (ValueError, RecursionError):
        raise InputError(f"{who}: is not readable JSON, or has a key twice") from None
    if not isinstance(value, dict):
        raise InputError(f"{who}: a JSON object is expected, found a {type(value).__name__}")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_constant(text: str) -> float:
    raise ValueError(text)  # NaN and Infinity, which Python writes and JSON has not


class Form(NamedTuple):
    """A field's form in JSON. `read` raises a ValueError that says what is expected."""

    read: Callable[[Any, Collection[str]], Any]  # the value, and the clients' names
    write: Callable[[Any], Any]


def octets(length: int) -> Form:
    """So many bytes, as hex digits."""

    def read(value: Any, names: Collection[str]) -> bytes:
        if not isinstance(value, str) or not re.fullmatch(f"[0-9a-f]{{{2 * length}}}", value):
            raise ValueError(f"{2 * length} hex digits")
        return bytes.fromhex(value)

    return Form(read, bytes.hex)


def _read_base64(value: Any, names: Collection[str]) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except (TypeError, ValueError):
        raise ValueError("base64") from None


encoded = Form(_read_base64, lambda value: base64.b64encode(value).decode())
"""Any bytes, such as another message."""


def _read_clients(value: Any, names: Collection[str]) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError("a list of clients")
    if sorted(set(value)) != value:
        raise ValueError("clients in order, each once")
    if strangers := [name for name in value if name not in names]:
        raise ValueError(f"clients of this sum, and not {strangers[0]!r:.100}")
    return tuple(value)


clients = Form(_read_clients, list)
"""A set of clients: a sorted tuple of names."""


def by_client(form: Form) -> Form:
    """A value for each of some clients."""

    def read(value: Any, names: Collection[str]) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValueError("values by client")
        if strangers := [name for name in value if name not in names]:
            raise ValueError(f"clients of this sum, and not {strangers[0]!r:.100}")
        return {name: form.read(value[name], names) for name in sorted(value)}

    return Form(read, lambda value: {name: form.write(each) for name, each in value.items()})
