"""Opening pictures: from a file, an address or base64 to upright 8-bit RGB, everywhere alike.

Grey pictures of more than 8 bits keep their 8 highest bits, as Pillow keeps those of colour ones:
the range is their type's, not that of the values found. In signed ones 0 is black, and a value
below it is refused; so is a float picture that does not lie in [0, 1]. Of several pages or frames
the first is taken; transparency is dropped, not blended, as upstream does.
"""

from __future__ import annotations

import base64
import binascii
import errno
import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffTags, UnidentifiedImageError

from llava.constants import MAX_PIXELS
from llava.errors import InputError, reason

MAX_BYTES = 256 << 20
"""The largest picture that is taken from an address."""

LONGEST_SIDE = 100_000
"""Pixels of the longest side that is taken; what is padded to a square needs memory for it."""

READING = 2
"""Counts up when a file is read as other pixels than before: features kept on disk hang on it."""

_OF_THE_PATH = {
    getattr(errno, name)
    for name in "ENOENT ENOTDIR EISDIR EACCES ELOOP ENAMETOOLONG EINVAL".split()
}
_TIFF = {tag.name: number for number, tag in TiffTags.TAGS_V2.items()}


def open_image(
    picture: str | os.PathLike | bytes, name: str | None = None, most_pixels: int | None = None
) -> Image.Image:
    """The whole picture, upright (EXIF orientation applied) and RGB, its file closed.

    A missing, truncated or foreign file is an `InputError` that begins with `name`, else with the
    path; so are grey values whose scale is unknown (floats outside [0, 1], integers below 0), a
    side over `LONGEST_SIDE`, and over `most_pixels`, which its head tells before it is decoded.

    Args:
        picture: a path, or a file's bytes.
    """
    try:
        with _head(picture) as image:
            _check_size(image, most_pixels)
            upright = ImageOps.exif_transpose(image)
            return (_grey(upright, image) if _is_deep(image) else upright).convert("RGB")
    except Exception as error:  # Pillow's decoders raise anything from OSError to struct.error
        raise _unreadable(name or f"picture {picture!s:.300}", error) from error


def image_size(picture: str | os.PathLike | bytes, name: str | None = None) -> tuple[int, int]:
    """Width and height in pixels of the upright picture, which is not decoded."""
    try:
        with _head(picture) as image:
            # A TIFF's size is that of its upright picture already, in some versions of Pillow.
            size = _tag(image, "ImageWidth"), _tag(image, "ImageLength")
            width, height = size if image.format == "TIFF" else image.size
            turned = _orientation(image) in (5, 6, 7, 8)
            return (height, width) if turned else (width, height)
    except Exception as error:
        raise _unreadable(name or f"picture {picture!s:.300}", error) from error


def load_image(path_or_url: str) -> Image.Image:
    """An upright RGB picture from a file, or from an http(s) address.

    An address that is silent for 30 seconds, or sends over `MAX_BYTES`, is an `InputError` too.
    """
    if not path_or_url.startswith(("http://", "https://")):
        return open_image(path_or_url)
    from urllib.request import Request, urlopen

    name = f"picture {path_or_url}"
    try:
        # Some servers refuse Python's own name.
        request = Request(path_or_url, headers={"User-Agent": "fedllava"})
        with urlopen(request, timeout=30) as response:
            data = response.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise InputError(f"more than {MAX_BYTES >> 20} MiB")
    except Exception as error:
        raise _unreadable(name, error) from error
    return open_image(data, name)


def is_of_the_picture(error: InputError) -> bool:
    """Whether a picture that was not read is at fault itself, or is not there.

    Else the disk or the network failed, or memory or file handles were short: it may be read later.
    """
    cause = error.__cause__
    if isinstance(cause, OSError):  # Pillow's own have no number
        return cause.errno is None or cause.errno in _OF_THE_PATH
    return not isinstance(cause, MemoryError)


def load_images(paths_or_urls: Sequence[str]) -> list[Image.Image]:
    """The pictures of several files or addresses."""
    return [load_image(path_or_url) for path_or_url in paths_or_urls]


def load_image_from_base64(image: str | bytes) -> Image.Image:
    """The whole picture that a request carries, upright and RGB.

    `InputError` when it is none, or has over `MAX_PIXELS`: a stranger's few kilobytes must not
    become gigabytes.
    """
    name = "the base64 picture"
    try:
        data = base64.b64decode(image)
    except ValueError as error:
        raise _unreadable(name, error) from error
    return open_image(data, name, MAX_PIXELS)


def plain_kind(data: bytes) -> str | None:
    """`png`, `jpeg` or the like; None where other readers may see another picture in this file.

    They do not all turn what EXIF says is turned, and make white of grey values over 8 bits.
    """
    with _head(data) as image:
        plain = not _is_deep(image) and _orientation(image) not in range(2, 9)
        return image.format.lower() if plain and image.format else None


def _head(picture: str | os.PathLike | bytes) -> Image.Image:
    return Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture)


def _orientation(image: Image.Image) -> Any:
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def _check_size(image: Image.Image, most_pixels: int | None) -> None:
    size = f"{image.width} x {image.height} pixels"
    if min(image.size) < 1:
        raise InputError(f"{size}: it is empty")
    if most_pixels and image.width * image.height > most_pixels:
        raise InputError(f"{size}; at most {most_pixels // 10**6} million are taken")
    if max(image.size) > LONGEST_SIDE:
        raise InputError(f"{size}; sides of at most {LONGEST_SIDE} are taken")


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith("I") or image.mode == "F"


def _grey(image: Image.Image, file: Image.Image) -> Image.Image:
    """A deep grey picture, of which `file` tells how it was stored, as one of 8 bits."""
    values = np.asarray(image)
    if image.mode == "F":
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 1):  # also where some are NaN
            raise InputError(f"float values from {low:g} to {high:g}; 0 to 1 is expected")
        grey = np.rint(values * 255).astype(np.uint8)
    else:
        bits, signed = _bits(file)
        if bits == 32 and not signed:
            values = values.view(np.uint32)  # Pillow has signed ones alone
        if (low := values.min()) < 0:
            raise InputError(f"values from {low} to {values.max()}; none below 0 is expected")
        grey = (values >> (bits - signed - 8)).astype(np.uint8)
    if _tag(file, "PhotometricInterpretation") == 0:  # 0 is white; Pillow turns 8 bits alone
        grey = 255 - grey
    return Image.fromarray(grey)


def _bits(file: Image.Image) -> tuple[int, bool]:
    """The number of bits of a value in the file, and whether one of them is the sign."""
    if file.format == "TIFF":
        return _tag(file, "BitsPerSample")[0], _tag(file, "SampleFormat") == (2,)
    in_sixteen = file.mode != "I" or file.format in ("PNG", "PPM")
    return (16, False) if in_sixteen else (32, True)


def _tag(file: Image.Image, name: str) -> Any:
    """A value of a TIFF; None where it has none, or is no TIFF."""
    return getattr(file, "tag_v2", {}).get(_TIFF[name])


def _unreadable(name: str, error: Exception) -> InputError:
    if isinstance(error, FileNotFoundError):
        why = "no such file"
    elif isinstance(error, UnidentifiedImageError):
        why = "cannot identify it as a picture"
    elif isinstance(error, binascii.Error):
        why = "this is not base64"
    else:
        why = reason(error)
    return InputError(f"{name} cannot be read: {why}")
