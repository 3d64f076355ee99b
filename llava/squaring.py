"""A picture in the square that the tower sees, in bounded memory however long and thin it is.

A picture is squared by padding it, or the processor scales its shorter side to the tower's and cuts
out the centre. Of a thin picture both make something vast on the way: a web page of 1200 x 30000
pixels becomes 30000 x 30000, a line of 20000 x 1 becomes 4480000 x 224. Where that would be more
than `MAX_BETWEEN_PIXELS` pixels, the same pixels are made without it, a grey level apart at most.
"""

from __future__ import annotations

import math
from typing import Any

from PIL import Image

MAX_BETWEEN_PIXELS = 1 << 25
"""Pixels of the largest picture that is made on the way to the tower's."""

_BAND = 1 << 22  # pixels that are padded at a time

_SUPPORT = 3  # source pixels, or target ones if larger, at each side that any filter looks at


def expand2square(image: Image.Image, background_color: Any) -> Image.Image:
    """Centre the picture on a square of `background_color`, as wide as its longer side."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new(image.mode, (side, side), background_color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def square_of(
    image: Image.Image,
    background_color: Any,
    side: int,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """`expand2square` and then a resize to `side`, without the large square.

    Pillow resizes along x, each row for itself, and then along y; so do we, the second time with
    the picture on its side. The levels are the same but for a rounding of the filter's weights.
    """
    long, on_its_side = max(image.size), Image.Transpose.TRANSPOSE
    narrow, left = _padded(image, background_color, long, side, resample)
    seen, top = _padded(narrow.transpose(on_its_side), background_color, long, side, resample)
    square = Image.new(image.mode, (side, side), background_color)
    square.paste(seen.transpose(on_its_side), (left, top))
    return square


def _padded(
    image: Image.Image, background_color: Any, long: int, side: int, resample: Image.Resampling
) -> tuple[Image.Image, int]:
    """Each row, padded at both ends to `long` pixels, resized to `side`; where that is not all
    background, and how much of it comes before.

    A few rows at a time: of a picture that is nearly square all of them are too large.
    """
    left, scale = (long - image.width) // 2, long / side
    begin, end = _span(left / scale, (left + image.width) / scale, 1 / scale, side)
    first, last = _span(begin * scale, end * scale, scale, long)
    box = begin * scale - first, end * scale - first
    step = max(1, _BAND // long)
    narrow = Image.new(image.mode, (end - begin, image.height))
    for y in range(0, image.height, step):
        rows = image.crop((0, y, image.width, min(y + step, image.height)))
        band = Image.new(image.mode, (last - first, rows.height), background_color)
        band.paste(rows, (left - first, 0))
        size = (narrow.width, rows.height)
        narrow.paste(band.resize(size, resample, (box[0], 0, box[1], rows.height)), (0, y))
    return narrow, begin


def _span(first: float, last: float, scale: float, most: int) -> tuple[int, int]:
    """The interval, within 0 to `most`, that a filter of this scale reads for `first` to `last`."""
    margin = _SUPPORT * max(scale, 1) + 1
    return max(0, math.floor(first - margin)), min(most, math.ceil(last + margin))


def for_processor(image: Image.Image, processor: Any, background_color: Any = None) -> Image.Image:
    """The processor's input: the picture, on a square if it has a `background_color`.

    Where the way from there would be too large, it is the picture as the processor resizes it,
    which resizes it no more, and of that as much as it cuts out.
    """
    size = processor.size
    short = size.get("shortest_edge")
    side = short or size.get("height")
    resizes = processor.do_resize and not size.get("longest_edge")
    if background_color is not None:
        square = resizes and side == (short or size.get("width"))
        if square and max(image.size) ** 2 > MAX_BETWEEN_PIXELS:
            return square_of(image, background_color, side, processor.resample)
        return expand2square(image, background_color)
    if resizes and short and getattr(processor, "do_center_crop", False):
        shown = int(short * max(image.size) / min(image.size))
        if short * shown > MAX_BETWEEN_PIXELS:
            return _centre_of(image, short, shown, processor)
    return image


def _centre_of(image: Image.Image, short: int, shown: int, processor: Any) -> Image.Image:
    """The middle of the picture as resized to `short` by `shown`, at least what is cut out of it.

    As the number of pixels left out at both ends is the same, the processor cuts where it would.
    """
    kept = max(short, processor.crop_size["height"], processor.crop_size["width"])
    kept += (shown - kept) % 2
    long, start = max(image.size), (shown - kept) // 2
    scale = long / shown  # pixels of the picture for one of the result
    first, last = _span(start * scale, (start + kept) * scale, scale, long)
    begin, end = start * scale - first, (start + kept) * scale - first
    if image.width > image.height:
        part = image.crop((first, 0, last, image.height))
        return part.resize((kept, short), processor.resample, (begin, 0, end, image.height))
    part = image.crop((0, first, image.width, last))
    return part.resize((short, kept), processor.resample, (0, begin, image.width, end))
