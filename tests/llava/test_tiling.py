"""Tiles: upstream's choices of resolution and grid, and tokens in their places."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava.errors import InputError
from llava.mm_utils import image_size
from llava.tiling import (
    Tiling,
    default_resolutions,
    divide_to_patches,
    get_anyres_image_grid_shape,
    read_resolutions,
    resize_and_pad_image,
    select_best_resolution,
    unpad_image,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "upstream_golden.json").read_text())
PINPOINTS = default_resolutions(336)


def size_of(text: str, by: str = "x") -> tuple[int, ...]:
    return tuple(int(number) for number in text.strip("()").split(by))


@pytest.mark.parametrize("size", GOLDEN["best_resolution"])
def test_best_resolution_is_upstreams(size):
    assert list(select_best_resolution(size_of(size), PINPOINTS)) == GOLDEN["best_resolution"][size]


@pytest.mark.parametrize("size", GOLDEN["anyres_grid"])
def test_grid_is_upstreams(size):
    text = str([list(resolution) for resolution in PINPOINTS])
    grid = get_anyres_image_grid_shape(size_of(size), text, 336)
    assert list(grid) == GOLDEN["anyres_grid"][size]


@pytest.mark.parametrize("case", GOLDEN["unpad"])
def test_unpadding_is_upstreams(case):
    grid, size = (size_of(part, ", ") for part in case.split("|"))
    assert list(unpad_image(torch.zeros(1, *grid), size).shape) == GOLDEN["unpad"][case]


SIZES = [(640, 480), (480, 640), (200, 1000), (3000, 300), (17, 16), (100_000, 1), (1, 9000)]


@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
@pytest.mark.parametrize("size", SIZES)
def test_as_many_tokens_are_arranged_as_were_counted(merge, size):
    tiling = Tiling(PINPOINTS, 336, 24, merge)
    tiles = 1 + tiling.grid(size)[0] * tiling.grid(size)[1]
    tokens = torch.randn(tiles, 24 * 24, 2)
    assert len(tiling.arrange(tokens, size, torch.zeros(2))) == tiling.num_tokens(size)


def test_tokens_lie_in_the_rows_of_the_picture():
    """Each token says where in the picture it was cut from."""
    tiling = Tiling(((6, 4),), tile=2, side=2, merge="spatial_unpad")
    size = (6, 3)  # half a pixel row of padding above and below is not taken off, a whole one is
    y, x = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    places = torch.stack([y, x], -1).float()
    tiles = [places[i : i + 2, j : j + 2].reshape(4, 2) for i in (0, 2) for j in (0, 2, 4)]
    tokens = torch.stack([torch.full((4, 2), -1.0), *tiles])
    out = tiling.arrange(tokens, size, torch.tensor([9.0, 9.0]))
    assert (out[:4] == -1).all()
    rows = out[4:].reshape(-1, 7, 2)
    assert (rows[:, -1] == 9).all()
    assert torch.equal(rows[:, :-1], places)
    out = tiling.arrange(tokens, (6, 2), torch.tensor([9.0, 9.0]))
    assert torch.equal(out[4:].reshape(-1, 7, 2)[:, :-1], places[1:3])
    spatial = Tiling(((6, 4),), 2, 2, "spatial").arrange(tokens, size, None)
    assert torch.equal(spatial[4:].reshape(4, 6, 2), places)


def test_a_picture_is_scaled_centred_and_cut():
    image = Image.new("RGB", (30, 10), (200, 0, 0))
    padded = resize_and_pad_image(image, (60, 40))
    assert padded.size == (60, 40)
    assert padded.getpixel((30, 5)) == (0, 0, 0)
    assert padded.getpixel((30, 20)) == (200, 0, 0)
    tiles = divide_to_patches(padded, 20)
    assert len(tiles) == 6
    assert tiles[3].getpixel((0, 0)) == padded.getpixel((0, 20))


def test_the_size_is_that_of_the_upright_picture(tmp_path):
    image = Image.new("RGB", (30, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.save(tmp_path / "plain.png")
    assert image_size(tmp_path / "turned.jpg") == (10, 30)
    assert image_size(tmp_path / "plain.png") == (30, 10)


@pytest.mark.parametrize("bad", [None, "", "[(1, 2", "rubbish(", [[1, 2, 3]], [], [[0, 4]]])
def test_bad_pinpoints_are_named(bad):
    with pytest.raises(InputError, match="image_grid_pinpoints is"):
        read_resolutions(bad)


def test_the_wrong_number_of_tiles_is_an_error():
    with pytest.raises(InputError, match=r"takes 1 \+ 2 x 2 tiles of 576 tokens, found 3 of 576"):
        Tiling(PINPOINTS, 336, 24).arrange(torch.zeros(3, 576, 2), (640, 480), None)
