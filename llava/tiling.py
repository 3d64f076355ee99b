"""`anyres`: a large picture as tiles, and the layout of their tokens (LLaVA-1.6).

A picture is scaled into the best fitting of several resolutions (`image_grid_pinpoints`), padded
and cut into tiles as large as the vision tower's input. The tower sees the whole picture, squeezed
into one tile, and then each tile. Their tokens are laid out by `mm_patch_merge_type`: `flat` (tile
after tile), `spatial` (tile after tile, after those of the whole), or `spatial_unpad` (the grid row
by row without the padding, with a learnt newline token at the end of each row).
"""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from llava.errors import InputError

Size = tuple[int, int]
"""Width and height in pixels, as `PIL.Image.size`."""

MERGE_TYPES = ("flat", "spatial", "spatial_unpad")


@dataclass(frozen=True)
class Tiling:
    """The sizes and settings by which pictures are tiled.

    Args:
        resolutions: (width, height) in pixels, of which the best fitting is taken.
        tile: side of a tile in pixels.
        side: tokens along the side of a tile.
        merge: one of `MERGE_TYPES`.
    """

    resolutions: tuple[Size, ...]
    tile: int
    side: int
    merge: str = "flat"

    def grid(self, size: Size) -> Size:
        """Tiles across and down for a picture of `size`."""
        width, height = select_best_resolution(size, self.resolutions)
        return width // self.tile, height // self.tile

    def num_tokens(self, size: Size) -> int:
        """The number of tokens that a picture of `size` becomes."""
        across, down = self.grid(size)
        whole = self.side**2
        if self.merge != "spatial_unpad":
            return whole * (1 + across * down)
        left, top = _padding((across * self.side, down * self.side), size)
        rows, columns = down * self.side - 2 * top, across * self.side - 2 * left
        return whole + rows * (columns + 1)

    def arrange(
        self, tokens: torch.Tensor, size: Size, newline: torch.Tensor | None
    ) -> torch.Tensor:
        """Tokens of the tiles (1 + tiles, side², C), the whole picture's first → (`num_tokens`, C).

        `newline` (C,) is the model's `image_newline`, which `spatial_unpad` needs.
        """
        across, down = self.grid(size)
        if len(tokens) != 1 + across * down or tokens.shape[1] != self.side**2:
            raise InputError(
                f"a picture of {size[0]} x {size[1]} takes 1 + {across} x {down} tiles of "
                f"{self.side**2} tokens, found {len(tokens)} of {tokens.shape[1]}"
            )
        if self.merge == "flat":
            return tokens.flatten(0, 1)
        whole, tiles = tokens[0], tokens[1:].unflatten(1, (self.side, self.side))
        # (down, across, y, x, C) → (down, y, across, x, C): the picture's own rows.
        rows = tiles.unflatten(0, (down, across)).transpose(1, 2)
        if self.merge == "spatial":
            return torch.cat([whole, rows.flatten(0, 3)])
        grid = rows.flatten(0, 1).flatten(1, 2)
        left, top = _padding((grid.shape[1], grid.shape[0]), size)
        grid = grid[top : grid.shape[0] - top, left : grid.shape[1] - left]
        assert newline is not None, "spatial_unpad has a newline token"
        ends = newline.to(grid).expand(len(grid), 1, -1)
        return torch.cat([whole, torch.cat([grid, ends], dim=1).flatten(0, 1)])


def read_resolutions(pinpoints: Any) -> tuple[Size, ...]:
    """`image_grid_pinpoints`: a list of [width, height], or upstream's text of one."""
    try:
        found = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
        sizes = tuple((int(width), int(height)) for width, height in found)
    except (ValueError, TypeError, SyntaxError):
        sizes = ()
    if not sizes or min(min(size) for size in sizes) < 1:
        raise InputError(
            f"image_grid_pinpoints is {pinpoints!r}, a list of [width, height] is expected"
        )
    return sizes


def default_resolutions(tile: int) -> tuple[Size, ...]:
    """LLaVA-1.6's: 1x2, 2x1, 2x2, 3x1 and 1x3 tiles."""
    return tuple((tile * x, tile * y) for x, y in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)))


def select_best_resolution(original_size: Size, possible_resolutions: Sequence[Size]) -> Size:
    """The (width, height) that keeps most of the picture's pixels, then wastes least."""

    def quality(resolution: Size) -> tuple[int, int]:
        scale = min(resolution[0] / original_size[0], resolution[1] / original_size[1])
        shown = int(original_size[0] * scale) * int(original_size[1] * scale)
        kept = min(shown, original_size[0] * original_size[1])
        return kept, kept - resolution[0] * resolution[1]

    width, height = max(possible_resolutions, key=quality)
    return width, height


def resize_and_pad_image(image: Image.Image, target_resolution: Size) -> Image.Image:
    """The picture scaled to fit into `target_resolution`, centred on black."""
    (width, height), (full_width, full_height) = image.size, target_resolution
    if full_width / width < full_height / height:
        fitted = full_width, min(math.ceil(height * full_width / width), full_height)
    else:
        fitted = min(math.ceil(width * full_height / height), full_width), full_height
    padded = Image.new("RGB", (full_width, full_height))
    padded.paste(
        image.resize(fitted), ((full_width - fitted[0]) // 2, (full_height - fitted[1]) // 2)
    )
    return padded


def divide_to_patches(image: Image.Image, patch_size: int) -> list[Image.Image]:
    """Square tiles of `patch_size` pixels, row by row."""
    return [
        image.crop((x, y, x + patch_size, y + patch_size))
        for y in range(0, image.height, patch_size)
        for x in range(0, image.width, patch_size)
    ]


def get_anyres_image_grid_shape(
    image_size: Size, grid_pinpoints: Any, patch_size: int
) -> tuple[int, int]:
    """Tiles across and down; upstream's name."""
    return Tiling(read_resolutions(grid_pinpoints), patch_size, 1).grid(image_size)


def process_anyres_image(image: Image.Image, processor: Any, grid_pinpoints: Any) -> torch.Tensor:
    """Pixels (1 + tiles, 3, H, W): the whole picture squeezed into a tile, then the tiles."""
    best = select_best_resolution(image.size, read_resolutions(grid_pinpoints))
    tile = tile_side(processor)
    tiles = divide_to_patches(resize_and_pad_image(image, best), tile)
    return torch.stack(
        [
            processor.preprocess(part, return_tensors="pt")["pixel_values"][0]
            for part in (image.resize((tile, tile)), *tiles)
        ]
    )


def tile_side(processor: Any) -> int:
    """The pixels along a side of the tower's input: what a processor cuts out, if it does."""
    cuts = getattr(processor, "do_center_crop", False)
    return (processor.crop_size if cuts else processor.size)["height"]


def unpad_image(tensor: torch.Tensor, original_size: Size) -> torch.Tensor:
    """Cut off (C, H, W) what padding a picture of `original_size` to that shape has added."""
    height, width = tensor.shape[1:]
    left, top = _padding((width, height), original_size)
    return tensor[:, top : height - top, left : width - left]


def _padding(grid: Size, size: Size) -> Size:
    """Columns at the left (and right) and rows at the top (and bottom) of `grid` that are padding.

    In float64 as upstream computes it: a rounding decides the number of tokens.
    """
    (columns, rows), (width, height) = grid, size
    if width / height > columns / rows:
        return 0, (rows - int(height * (columns / width))) // 2
    return (columns - int(width * (rows / height))) // 2, 0
