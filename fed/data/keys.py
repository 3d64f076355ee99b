"""Keys, by which clients differ: read from a sample, as text."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

from fed.data.samples import Sample
from llava.errors import InputError

HELP = (
    "what clients differ in: a field of the record, of --meta or of a shard's .json; "
    "`image-folder` or `image-folder:N`, the first (N) folders of the picture's path; `url-host` "
    "or `url-host:FIELD`, the host of the address in FIELD (`url`); `shard`, the tar; with "
    "--styles `style`; with --tower `cluster`. Several: their product"
)


def reader(key: str) -> Callable[[Sample], str]:
    """The function that reads a key; it raises `InputError` for a sample that lacks it."""
    kind, _, detail = key.partition(":")
    if kind == "image-folder":
        if detail and not (detail.isdigit() and int(detail)):
            raise InputError(f"--key {key}: a number over 0 is expected after the colon")
        return lambda sample: _folder(sample, int(detail or 1))
    if kind == "url-host":
        return lambda sample: _host(sample, detail or "url")
    return lambda sample: field(sample, key)


def field(sample: Sample, name: str) -> str:
    """A field that is text or a number; `InputError` names the sample and what there is."""
    value = sample.fields.get(name)
    if isinstance(value, str | int | float):
        return str(value)
    if name in sample.fields:
        raise InputError(f"{sample.name}: `{name}` is {value!r:.80}, text is expected")
    raise InputError(f"{sample.name}: has no `{name}`; it has {', '.join(sorted(sample.fields))}")


def _folder(sample: Sample, depth: int) -> str:
    image = sample.record["image"]
    folders = (image[0] if isinstance(image, list) else image).split("/")[:-1]
    return "/".join(folders[:depth]) or "."


def _host(sample: Sample, name: str) -> str:
    address = field(sample, name)
    try:
        host = urlsplit(address).hostname
    except ValueError:
        host = None
    if not host:
        raise InputError(f"{sample.name}: `{name}` is {address!r:.80}, an address is expected")
    return host.removeprefix("www.")
