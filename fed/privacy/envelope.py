"""The one form in which messages of a secure sum travel, and all that is checked of it.

    length of the header (8 bytes, little-endian) | header | signature (64 bytes) | body

The header is JSON: the kind, the sender, run, round, exchange, attempt, the digest of the terms,
and the message's fields. A client signs its header, as it stands, with its site's Ed25519 key; a
server's messages are not signed, as clients do not trust it. Only a masked input has a body: the
ring's elements, little-endian, whose SHA-256 is in the header.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from typing import Any, TypeVar

import numpy as np

from fed.privacy.fixed_point import Ring
from fed.privacy.keys import SIGNATURE, Ed25519PrivateKey, is_signed
from fed.privacy.messages import MaskedInput, Message
from fed.privacy.strict_json import read_object
from fed.privacy.terms import Terms
from llava.errors import InputError

_DOMAIN = b"fedllava secure sum message\0"

M = TypeVar("M", bound=Message)


def encode(
    message: Message, terms: Terms, sender: str = "", key: Ed25519PrivateKey | None = None
) -> bytes:
    """A message as it travels, without its body; equal messages give equal bytes."""
    fields = {f.name: f.metadata["form"].write(getattr(message, f.name)) for f in _fields(message)}
    header = {**fields, **_known(type(message), terms, sender)}
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)  # so that a body is aligned
    signature = bytes(SIGNATURE) if key is None else key.sign(_DOMAIN + text)
    return struct.pack("<Q", len(text)) + text + signature


def decode(data: Any, kind: type[M], terms: Terms, sender: str = "") -> M:
    """A message of `kind` from `sender`, "" for the server, with all of it checked.

    Args:
        data: bytes, or any buffer, such as a mapped file; a body stays where it is.

    Raises:
        InputError: it is none, is cut short or too long, another one signed it, it is of another
            run, round, exchange or attempt, or a field is not as it must be. The message names the
            sender and the field.
    """
    who = f"{f'client {sender}' if sender else 'the server'}: its {kind.__name__} message"
    text, signature, body = _parts(data, terms, who)
    signed = not kind.of_client or is_signed(signature, _DOMAIN + text, terms.sites[sender])
    if not signed:
        raise InputError(f"{who} has a signature that is not {sender}'s over it")
    header = read_object(text, len(text), who)
    for name, value in _known(kind, terms, sender).items():
        found = header.pop(name, None)
        if type(found) is not type(value) or found != value:
            raise InputError(f"{who} has {name} {found!r:.100}, expected {value!r}")
    values = {}
    for field in _fields(kind):
        try:
            values[field.name] = field.metadata["form"].read(
                header.pop(field.name, None), terms.sites
            )
        except ValueError as error:
            raise InputError(f"{who} has a bad {field.name}, expected {error}") from None
    if header:
        raise InputError(f"{who} has a field {min(header)!r:.100}, which is not expected")
    message = kind(**values)
    if isinstance(message, MaskedInput):
        return dataclasses.replace(message, values=_ring(body, message.sha256, terms, who))
    if len(body):
        raise InputError(f"{who} has {len(body)} bytes after its end")
    return message


def head_of(data: Any) -> bytes:
    """All of a message but its body: what tells it from any other; "" of what is no message."""
    length = struct.unpack("<Q", bytes(data[:8]))[0] if len(data) >= 8 else 0
    return bytes(data[: 8 + length + SIGNATURE])


def _parts(data: Any, terms: Terms, who: str) -> tuple[bytes, bytes, memoryview]:
    if len(data) < 8 + SIGNATURE:
        raise InputError(f"{who} is cut short: it has {len(data)} bytes")
    view = memoryview(data)
    (length,) = struct.unpack("<Q", view[:8])
    count = len(terms.sites)
    most = 2**13 * (count + 1) + 2**8 * count**2  # the longest are K messages of K names
    if length > most:
        raise InputError(f"{who} has a header of {length} bytes, expected {most} at most")
    end = 8 + length
    if len(data) < end + SIGNATURE:
        raise InputError(f"{who} is cut short: it has {len(data)} bytes")
    return bytes(view[8:end]), bytes(view[end : end + SIGNATURE]), view[end + SIGNATURE :]


def _ring(body: memoryview, digest: bytes, terms: Terms, who: str) -> Ring:
    layout = terms.layout
    if len(body) != layout.nbytes:
        raise InputError(f"{who} has values of {len(body)} bytes, expected {layout.nbytes}")
    if hashlib.sha256(body).digest() != digest:
        raise InputError(f"{who} has values of another SHA-256 than its header says")
    return np.frombuffer(body, layout.dtype)


def _known(kind: type[Message], terms: Terms, sender: str) -> dict[str, Any]:
    return {**terms.context, "kind": kind.__name__, "sender": sender}


def _fields(message: Message | type[Message]) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(message) if "form" in field.metadata]
