"""Attention drawn on the picture: bright where the answer attended, dark elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llava.serve.ui.chat_state import Turn, images_of
from llava.serve.ui.worker_client import PageError, WorkerClient

if TYPE_CHECKING:
    from PIL import Image

DARKEST = 0.15  # what nothing looked at keeps so much of its light


async def overlays(client: WorkerClient, turns: list[Turn]) -> list[tuple[Image.Image, str]]:
    """The conversation's pictures as the last answer saw them, each with a caption."""
    from llava.pictures import load_image_from_base64

    if not turns or not turns[-1].answer or not images_of(turns):
        raise PageError("There is no answer about a picture yet.")
    conversation, images = turns[-1].conversation, images_of(turns)
    assert conversation is not None  # its answer is there
    worker, answer = await client.worker(turns[-1].model), conversation.messages[-1][1]
    grids, fit = await client.attention(worker, conversation.get_prompt(), answer, images)
    drawn = []
    for image, grid in zip(images, grids, strict=True):
        brightest = f"brightest patch {max(map(max, grid)):.0%}"
        drawn.append((overlay(load_image_from_base64(image), grid, fit), brightest))
    return drawn


def overlay(picture: Image.Image, grid: Sequence[Sequence[float]], fit: str) -> Image.Image:
    """`picture` dimmed where `grid` is low.

    Args:
        grid: rows of patches over the picture as the model squared it.
        fit: "pad", on a square as wide as the longer side; "crop", the centre cut out, where what
            the model did not see is darkest; or "stretch".
    """
    from PIL import Image

    most = max(map(max, grid)) or 1.0
    shape = picture.size
    if fit != "stretch":
        shape = (max(shape) if fit == "pad" else min(shape),) * 2
    small = Image.new("L", (len(grid[0]), len(grid)))
    small.putdata([round(255 * value / most) for row in grid for value in row])
    light = Image.new("L", picture.size, 0)
    corner = ((picture.width - shape[0]) // 2, (picture.height - shape[1]) // 2)
    light.paste(small.resize(shape, Image.Resampling.BICUBIC), corner)
    light = light.point(lambda value: round(255 * DARKEST + (1 - DARKEST) * value))
    return Image.composite(picture, Image.new("RGB", picture.size), light)
