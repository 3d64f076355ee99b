"""The messages between controller, workers and pages: upstream's wire format.

A question is one JSON object. Its answer is a stream of JSON objects with a zero byte after each:
`{"text": the prompt and all that has been generated so far, "error_code": 0}`. When something goes
wrong, the last object has another code, and its `text` says in words what it was.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import InputError
from llava.texts import half_character

NUL = b"\0"
ERROR_MODEL, NO_WORKER, WORKER_GONE = 1, 2, 3
"""The worker refuses or failed; there is no worker; the worker did not answer."""

GREEDY_BELOW = 1e-3
"""A temperature up to this takes the likeliest token, as upstream's worker does."""

MAX_NEW_TOKENS = 1024
MAX_CHARACTERS = 1_000_000
MAX_BYTES = 128 << 20
"""A longer answer is cut to this, a longer prompt or a larger question is refused."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A checked question: `images` are base64; without a `stop` the model's own mark ends it."""

    model: str
    prompt: str
    images: tuple[str, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    stop: str | None = None


def read_request(body: Any) -> Request:
    """Check a question that came over the wire; `InputError` names the field that is wrong."""
    if not isinstance(body, Mapping):
        raise InputError(f"a question is a JSON object, this is {_kind(body)}")
    prompt = _field(body, "prompt", str, "")
    if not prompt.strip():
        raise InputError("the prompt is empty")
    if len(prompt) > MAX_CHARACTERS:
        raise InputError(
            f"the prompt has {len(prompt):,} characters; at most {MAX_CHARACTERS:,} are taken"
        )
    images = _field(body, "images", list, [])
    if not all(isinstance(image, str) for image in images):
        raise InputError("images: a list of base64 strings is expected")
    if len(images) != (tags := prompt.count(DEFAULT_IMAGE_TOKEN)):
        raise InputError(
            f"{len(images)} pictures were sent, the prompt has {tags} {DEFAULT_IMAGE_TOKEN} tags"
        )
    return Request(
        model=_field(body, "model", str, ""),
        prompt=prompt,
        images=tuple(images),
        temperature=_number(body, "temperature", 1.0, "from 0 on", lambda t: t >= 0),
        top_p=_number(body, "top_p", 1.0, "over 0, at most 1", lambda p: 0 < p <= 1),
        max_new_tokens=min(
            int(_number(body, "max_new_tokens", 256, "of at least 1", lambda n: n >= 1)),
            MAX_NEW_TOKENS,
        ),
        stop=_field(body, "stop", str, None) or None,
    )


def read_json(data: bytes) -> Any:
    """The JSON of a body; `InputError` if it is none, or has text that UTF-8 cannot hold."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise InputError("the question is not JSON") from None
    if (half := half_character(body)) is not None:
        raise InputError(f"the question has half a character in {half!r}, which is no text")
    return body


def chunk(text: str, error_code: int = 0) -> bytes:
    """One object of an answer, with its zero byte."""
    return json.dumps({"text": text, "error_code": error_code}).encode() + NUL


class Reader:
    """The objects of an answer, from bytes that come cut anywhere."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> list[dict[str, Any]]:
        """The objects that end in `piece`."""
        *whole, self._rest = (self._rest + piece).split(NUL)
        return [json.loads(data) for data in whole if data]


def read_chunks(pieces: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The objects of an answer; one that was not finished is dropped."""
    reader = Reader()
    for piece in pieces:
        yield from reader.feed(piece)


def _field(body: Mapping, name: str, kind: type, default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise InputError(f"{name}: {_kind(value)} was sent, {kind.__name__} is expected")
    return value


def _number(body: Mapping, name: str, default: float, expected: str, good) -> float:
    value = body.get(name)
    value = default if value is None else value
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or not good(number):
        raise InputError(f"{name} is {str(value)[:40]!r}; a number {expected} is expected")
    return number


def _kind(value: Any) -> str:
    return type(value).__name__
