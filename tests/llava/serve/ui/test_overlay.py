"""Attention drawn on the picture."""

from __future__ import annotations

from PIL import Image

from llava.serve.ui.overlay import DARKEST, overlay


def test_attention_lies_where_the_model_saw_the_picture():
    white = Image.new("RGB", (80, 40), "white")
    left = [[1.0, 0.0]] * 2  # on a square of two by two patches
    dark, bright = round(255 * DARKEST), 255

    padded = overlay(white, left, "pad").convert("L")
    assert padded.getpixel((0, 20)) == bright
    assert padded.getpixel((79, 20)) == dark
    cropped = overlay(white, left, "crop").convert("L")  # saw columns 20 to 60 alone
    assert [cropped.getpixel((x, 20)) for x in (19, 20, 59, 60)] == [dark, bright, dark, dark]
    stretched = overlay(white, left, "stretch").convert("L")
    assert stretched.getpixel((0, 0)) == bright
    assert stretched.getpixel((79, 39)) == dark
    top = overlay(white.rotate(90, expand=True), [[1, 1], [0, 0]], "crop").convert("L")
    assert [top.getpixel((20, y)) for y in (19, 20, 59)] == [dark, bright, dark]
