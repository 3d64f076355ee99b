import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from llava import squaring
from llava.mm_utils import image_pixels
from llava.squaring import expand2square, square_of

GREY = (122, 116, 104)


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def clip(side: int, crop: int | None = None) -> CLIPImageProcessorPil:
    """Without what comes after the pixels, so that grey levels can be compared."""
    square = {"height": crop or side, "width": crop or side}
    return CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size=square, do_rescale=False, do_normalize=False
    )


def siglip(side: int) -> SiglipImageProcessorPil:
    return SiglipImageProcessorPil(
        size={"height": side, "width": side}, do_rescale=False, do_normalize=False
    )


def test_squares():
    red = Image.new("RGB", (5, 2), "red")
    square = expand2square(red, (1, 2, 3))
    assert square.size == (5, 5)
    column = [square.getpixel((4, y)) for y in range(5)]
    assert column == [(1, 2, 3), (255, 0, 0), (255, 0, 0), (1, 2, 3), (1, 2, 3)]
    assert expand2square(red.rotate(90, expand=True), 0).size == (5, 5)
    assert expand2square(square, (0, 0, 0)) is square


THIN = [(1, 700), (700, 1), (3, 200), (901, 7), (40, 1200), (333, 16)]


@pytest.mark.parametrize("size", [*THIN, (64, 64), (65, 50), (20, 31)])
@pytest.mark.parametrize("band", [1, 5000, 1 << 22])
def test_a_square_in_bands_is_the_square(size, band, monkeypatch):
    monkeypatch.setattr(squaring, "_BAND", band)
    for resample in (Image.Resampling.BICUBIC, Image.Resampling.LANCZOS):
        whole = expand2square(noise(*size), GREY).resize((24, 24), resample)
        banded = square_of(noise(*size), GREY, 24, resample)
        assert np.abs(np.asarray(banded, int) - np.asarray(whole, int)).max() <= 1


@pytest.mark.parametrize("size", THIN)
@pytest.mark.parametrize(
    "processor", [clip(32), clip(32, 27), clip(24, 30), clip(24, 31), siglip(24)]
)
@pytest.mark.parametrize("squared", ["pad", "square"])
def test_the_pixels_are_the_processors(size, processor, squared, monkeypatch):
    config = SimpleNamespace(image_aspect_ratio=squared)
    whole = image_pixels(noise(*size), processor, config)
    monkeypatch.setattr(squaring, "MAX_BETWEEN_PIXELS", 4000)
    bounded = image_pixels(noise(*size), processor, config)
    assert bounded.shape == whole.shape
    assert (bounded.int() - whole.int()).abs().max() <= 1  # Pillow rounds other weights


def test_ordinary_pictures_take_the_processors_own_way(monkeypatch):
    monkeypatch.setattr(squaring, "square_of", None)
    monkeypatch.setattr(squaring, "_centre_of", None)
    for squared in ("pad", "square"):
        config = SimpleNamespace(image_aspect_ratio=squared)
        assert image_pixels(noise(1600, 900), clip(32), config).shape == (3, 32, 32)


MEMORY = """
import base64, io, resource
from types import SimpleNamespace
from PIL import Image
from transformers import CLIPImageProcessorPil
from llava.conversation import get_template
from llava.mm_utils import image_pixels, load_image_from_base64

def pixels(image, side, squared):
    square = {"height": side, "width": side}
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square)
    config = SimpleNamespace(image_aspect_ratio=squared, image_grid_pinpoints=[[side, 2 * side]])
    return tuple(image_pixels(image, processor, config).shape)

def see(size, side, squared):
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, "PNG")
    image = load_image_from_base64(base64.b64encode(file.getvalue()))
    if squared == "page":
        return get_template("v1").process_image(image, "Pad", return_pil=True).size
    return pixels(image, side, squared)

for squared in ("square", "pad", "anyres", "page"):
    see((500, 700), 336, squared)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for size in (100_000, 1), (20_000, 1), (1, 20_000):
    assert see(size, 64, "square") == see(size, 64, "pad") == (3, 64, 64)
    assert see(size, 336, "square") == see(size, 336, "pad") == (3, 336, 336)
    assert see(size, 336, "anyres") == (3, 3, 336, 336)
    assert see(size, 336, "page") == (672, 672)
    print(size, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is counted in KiB on Linux alone")
def test_thin_pictures_take_little_memory():
    """The peak of a process, in MiB; without the bound it grows by 4 GB with the first."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown = [int(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(grown) == 3, done.stdout
    assert max(grown) < 200, done.stdout
