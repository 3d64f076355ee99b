import base64
import functools
import http.server
import io
import struct
import threading

import numpy as np
import pytest
from PIL import Image

from llava import mm_utils
from llava.errors import InputError
from llava.pictures import (
    LONGEST_SIDE,
    image_size,
    load_image,
    load_image_from_base64,
    open_image,
    plain_kind,
)

RAMP = np.arange(256)[None].repeat(3, 0)  # the 8-bit twin of the deep pictures


def stored(picture, kind, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def tiff(values, bits: int, sample_format: int, order: str = "<", photometric: int = 1) -> bytes:
    """A grey TIFF by hand, of kinds that Pillow does not write; `values` (H, W), 12 bits packed."""
    height, width = values.shape
    if bits == 12:
        text = "".join(f"{value:012b}" for value in values.flatten())
        data = int(text, 2).to_bytes(len(text) // 8, "big")
    else:
        kind = {1: "u", 2: "i", 3: "f"}[sample_format]
        data = values.astype(f"{order}{kind}{bits // 8}").tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1}
    tags |= {278: height, 279: len(data), 339: sample_format}
    entries = b"".join(struct.pack(order + "HHLL", n, 4, 1, v) for n, v in tags.items())
    mark = b"II*\0" if order == "<" else b"MM\0*"
    head = mark + struct.pack(order + "L", 8 + len(data))
    return head + data + struct.pack(order + "H", len(tags)) + entries + bytes(4)


def levels(data: bytes) -> np.ndarray:
    """The grey levels of what is opened, which are the same in the three colours."""
    pixels = np.asarray(open_image(data))
    assert pixels.dtype == np.uint8
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].astype(int)


# -- kinds of pictures -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_kind_of_picture_becomes_rgb(tmp_path, mode):
    image = Image.new("RGB", (6, 4), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 3, 4))
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    image.convert(mode).save(path)
    opened = open_image(path)
    assert opened.mode == "RGB"
    assert opened.size == (6, 4)
    assert opened.getpixel((0, 0)) == (255, 255, 255)
    assert opened.getpixel((5, 3)) == (0, 0, 0)


SIXTEEN, FLOAT = (RAMP * 257).astype(np.uint16), (RAMP / 255).astype(np.float32)
DEEP = {
    "16-bit PNG": stored(Image.fromarray(SIXTEEN), "PNG"),
    "16-bit PGM": stored(Image.fromarray(SIXTEEN), "PPM"),
    "16-bit JPEG 2000": stored(Image.fromarray(SIXTEEN), "JPEG2000"),
    "16-bit TIFF": stored(Image.fromarray(SIXTEEN), "TIFF"),
    "16-bit TIFF, packed": stored(Image.fromarray(SIXTEEN), "TIFF", compression="tiff_lzw"),
    "16-bit TIFF, big-endian": tiff(SIXTEEN, 16, 1, ">"),
    "16-bit TIFF, 0 is white": tiff(65535 - SIXTEEN, 16, 1, photometric=0),
    "12-bit TIFF": tiff(RAMP * 4095 // 255, 12, 1),
    "signed 16-bit TIFF": tiff(RAMP * 32767 // 255, 16, 2),
    "signed 16-bit TIFF, big-endian": tiff(RAMP * 32767 // 255, 16, 2, ">"),
    "32-bit TIFF": tiff(RAMP * (2**32 - 1) // 255, 32, 1),
    "signed 32-bit TIFF": tiff(RAMP * (2**31 - 1) // 255, 32, 2),
    "signed 32-bit TIFF, as Pillow writes it": stored(
        Image.fromarray((RAMP * (2**31 - 1) // 255).astype(np.int32)), "TIFF"
    ),
    "float TIFF": stored(Image.fromarray(FLOAT), "TIFF"),
    "float TIFF, big-endian": tiff(FLOAT, 32, 3, ">"),
    "float TIFF, 0 is white": tiff(1 - FLOAT, 32, 3, photometric=0),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_grey_is_its_eight_bit_twin(kind):
    assert np.abs(levels(DEEP[kind]) - RAMP).max() <= 1
    assert levels(DEEP[kind])[0, [0, -1]].tolist() == [0, 255]


def test_the_range_is_the_types_and_not_that_of_the_values():
    dim = np.array([[0, 256, 25700]], np.uint16)
    assert levels(stored(Image.fromarray(dim), "PNG")).tolist() == [[0, 1, 100]]


@pytest.mark.parametrize("samples", [3, 4])
def test_deep_colour_is_its_eight_bit_twin(samples):
    """Interleaved by hand, as Pillow writes no such TIFF."""
    pixels = np.stack([RAMP, 255 - RAMP, RAMP // 2, RAMP][:samples], -1)
    data = (pixels * 257).astype("<u2").tobytes()
    tags = {256: 256, 257: 3, 258: 8, 259: 1, 262: 2, 273: 16, 277: samples, 278: 3, 279: len(data)}
    if samples == 4:
        tags[338] = 2
    entries = b""
    for number, value in tags.items():
        count = samples if number == 258 else 1
        entries += struct.pack("<HHLL", number, 3 if number == 258 else 4, count, value)
    bits = struct.pack("<4H", 16, 16, 16, 16)
    head = b"II*\0" + struct.pack("<L", 16 + len(data))
    file = head + bits + data + struct.pack("<H", len(tags)) + entries + bytes(4)
    assert np.abs(np.asarray(open_image(file)).astype(int) - pixels[..., :3]).max() <= 1


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (tiff(RAMP, 32, 3), "float values from 0 to 255; 0 to 1 is expected"),
        (tiff(FLOAT - 0.5, 32, 3), "float values from -0.5 to 0.5; 0 to 1 is expected"),
        (tiff(np.array([[0.5, np.nan]]), 32, 3), "float values from nan to nan"),
        (tiff(np.array([[0.5, np.inf]]), 32, 3), "float values from 0.5 to inf"),
        (tiff(RAMP - 100, 16, 2), "values from -100 to 155; none below 0 is expected"),
        (tiff(RAMP - 100, 32, 2), "values from -100 to 155; none below 0 is expected"),
    ],
)
def test_values_of_unknown_scale_are_refused_by_name(tmp_path, data, why):
    path = tmp_path / "scan.tif"
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"^picture {path} cannot be read: {why}"):
        open_image(path)
    with pytest.raises(InputError, match=f"^the base64 picture cannot be read: {why}"):
        load_image_from_base64(base64.b64encode(data))


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_of_several_frames_the_first_is_taken(kind):
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = stored(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert open_image(data).getpixel((2, 2)) == (255, 0, 0)


def test_a_side_beyond_the_limit_is_an_error(tmp_path):
    longest = stored(Image.new("1", (LONGEST_SIDE, 1)), "PNG")
    assert open_image(longest).size == (LONGEST_SIDE, 1)
    Image.new("1", (1, LONGEST_SIDE + 1)).save(tmp_path / "line.png")
    with pytest.raises(InputError, match=r"line.png cannot be read: 1 x 100001 pixels; sides of"):
        open_image(tmp_path / "line.png")


# -- which way is up -------------------------------------------------------------------------------


@pytest.fixture
def corner():
    """Red at the top left, else blue."""
    image = Image.new("RGB", (96, 48), "blue")
    image.paste("red", (0, 0, 32, 16))
    return image


def turned(image, orientation: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return stored(image, kind, exif=exif)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_bytes_and_base64_are_turned_alike(tmp_path, corner, kind, orientation):
    data = turned(corner, orientation, kind)
    (tmp_path / "picture").write_bytes(data)
    opened = open_image(tmp_path / "picture")
    # The first row and column of what is stored: their sides in the scene, by the EXIF standard.
    top, left = "TL TR BR BL LT RT RB LB".split()[orientation - 1]
    place = {"T": 0.05, "B": 0.95, "L": 0.05, "R": 0.95}
    across, down = (left, top) if orientation < 5 else (top, left)
    assert opened.size == ((96, 48) if orientation < 5 else (48, 96))
    where = int(place[across] * opened.width), int(place[down] * opened.height)
    red, _, blue = opened.getpixel(where)
    assert red > 200
    assert blue < 60
    for other in (open_image(data), load_image_from_base64(base64.b64encode(data).decode())):
        assert other.mode == "RGB"
        assert other.tobytes() == opened.tobytes()
        assert other.size == opened.size
    assert image_size(tmp_path / "picture") == image_size(data) == opened.size


def test_deep_grey_is_turned_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = stored(Image.fromarray(SIXTEEN), "PNG", exif=exif)
    assert (levels(data) == np.rot90(RAMP, -1)).all()


def test_what_other_readers_may_see_otherwise_is_known(corner):
    assert plain_kind(stored(corner, "JPEG")) == "jpeg"
    assert plain_kind(turned(corner, 1, "PNG")) == "png"
    assert plain_kind(turned(corner, 3, "JPEG")) is None
    assert plain_kind(DEEP["16-bit PNG"]) is plain_kind(DEEP["float TIFF"]) is None


# -- where pictures come from ----------------------------------------------------------------------


def test_upstreams_names_are_in_mm_utils():
    for function in (load_image, load_image_from_base64, open_image, image_size):
        assert getattr(mm_utils, function.__name__) is function


def test_unreadable_pictures_are_named(tmp_path):
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole)
    data = whole.read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture at all")
    for name, reason in {
        "missing.png": "no such file",
        "cut.png": "truncated",
        "empty.png": "cannot identify",
        "text.png": "cannot identify",
        ".": "directory",
    }.items():
        with pytest.raises(InputError, match=reason) as caught:
            open_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    assert load_image(str(whole)).size == (64, 64)
    # Port 9 of this machine answers nobody.
    with pytest.raises(InputError, match="http://127.0.0.1:9/x.png"):
        load_image("http://127.0.0.1:9/x.png")


@pytest.fixture
def site(tmp_path):
    """The address of a server of the files in `tmp_path`, of `/hidden` (403), and of `/me.png`,
    a picture for those who say that they are fedllava."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/hidden" or (
                self.path == "/me.png" and "fedllava" not in self.headers["User-Agent"]
            ):
                self.send_error(403)
            else:
                super().do_GET()

        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_pictures_from_an_address(site, tmp_path, monkeypatch):
    Image.new("L", (6, 4)).save(tmp_path / "me.png")
    (tmp_path / "page.html").write_text("<p>no picture")
    picture = load_image(f"{site}/me.png")
    assert picture.size == (6, 4)
    assert picture.mode == "RGB"
    for page, reason in {
        "none.png": "HTTP Error 404",
        "hidden": "HTTP Error 403",
        "page.html": "cannot identify it as a picture",
    }.items():
        with pytest.raises(InputError, match=f"^picture {site}/{page} cannot be read: {reason}"):
            load_image(f"{site}/{page}")
    monkeypatch.setattr("llava.pictures.MAX_BYTES", 8)
    with pytest.raises(InputError, match="me.png cannot be read: more than"):
        load_image(f"{site}/me.png")


def test_base64_pictures():
    buffer = io.BytesIO()
    Image.new("RGB", (99, 98), "blue").save(buffer, "PNG")
    data = buffer.getvalue()
    assert load_image_from_base64(base64.b64encode(data).decode()).size == (99, 98)
    for broken in (b"no picture", data[:60], b""):
        with pytest.raises(InputError, match="the base64 picture cannot be read"):
            load_image_from_base64(base64.b64encode(broken))
