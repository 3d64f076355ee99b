import base64
import functools
import http.server
import io
import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, LlamaTokenizer

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import InputError
from llava.mm_utils import (
    KeywordsStoppingCriteria,
    expand2square,
    expand_image_tokens,
    get_model_name_from_path,
    image_pixels,
    load_image,
    load_image_from_base64,
    open_image,
    process_images,
    tokenizer_image_token,
)

GOLDEN_DIR = Path(__file__).parents[1] / "golden"
GOLDEN = json.loads((GOLDEN_DIR / "upstream_golden.json").read_text())
UPSTREAM_TOKENS = json.loads((GOLDEN_DIR / "upstream_tokens.json").read_text())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    shutil.copy(GOLDEN_DIR / "toy_tokenizer.model", folder / "tokenizer.model")
    return LlamaTokenizer.from_pretrained(folder, add_bos_token=True, legacy=False)


@pytest.fixture(scope="module")
def processor():
    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


# -- pictures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_kind_of_picture_becomes_rgb(tmp_path, mode):
    image = Image.new("RGB", (6, 4), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 3, 4))
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    image.convert(mode).save(path)
    opened = open_image(path)
    assert opened.mode == "RGB" and opened.size == (6, 4)
    assert opened.getpixel((0, 0)) == (255, 255, 255) and opened.getpixel((5, 3)) == (0, 0, 0)


def test_a_turned_photograph_is_set_upright(tmp_path):
    image = Image.new("RGB", (6, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (4, 6)


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
    assert picture.size == (6, 4) and picture.mode == "RGB"
    for page, reason in {
        "none.png": "HTTP Error 404",
        "hidden": "HTTP Error 403",
        "page.html": "cannot identify it as a picture",
    }.items():
        with pytest.raises(InputError, match=f"^picture {site}/{page} cannot be read: {reason}"):
            load_image(f"{site}/{page}")
    monkeypatch.setattr("llava.mm_utils.MOST_BYTES", 8)
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


def test_squares():
    red = Image.new("RGB", (5, 2), "red")
    square = expand2square(red, (1, 2, 3))
    assert square.size == (5, 5)
    column = [square.getpixel((4, y)) for y in range(5)]
    assert column == [(1, 2, 3), (255, 0, 0), (255, 0, 0), (1, 2, 3), (1, 2, 3)]
    assert expand2square(red.rotate(90, expand=True), 0).size == (5, 5)
    assert expand2square(square, (0, 0, 0)) is square


def test_padding_shows_the_whole_picture_and_square_cuts_its_centre(processor):
    image = Image.new("RGB", (96, 32), "black")
    image.paste((255, 255, 255), (0, 0, 8, 32))  # a white strip at the left edge
    padded = image_pixels(image, processor, SimpleNamespace(image_aspect_ratio="pad"))
    cut = image_pixels(image, processor, SimpleNamespace())
    assert padded.shape == cut.shape == (3, 32, 32)
    black, white = cut.min(), padded.max()
    assert (cut == cut[:, :1, :1]).all() and white > 1.5 and black < -1.4
    # The rows above the picture hold the mean colour, which is about 0 after normalisation.
    assert padded[:, 0].abs().max() < 0.02


def test_process_images(processor):
    images = [Image.new("RGB", (40, 20)), Image.new("RGB", (20, 50))]
    for aspect in ("pad", "square", None):
        config = SimpleNamespace(image_aspect_ratio=aspect)
        assert process_images(images, processor, config).shape == (2, 3, 32, 32)
    tiled = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints="[(64, 32)]")
    assert process_images(images, processor, tiled).shape == (2, 3, 3, 32, 32)
    with pytest.raises(InputError, match="image_grid_pinpoints is None"):
        process_images(images, processor, SimpleNamespace(image_aspect_ratio="anyres"))
    uneven = CLIPImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False)
    config = SimpleNamespace(image_aspect_ratio="square")
    shapes = [tuple(pixels.shape) for pixels in process_images(images, uneven, config)]
    assert shapes == [(3, 32, 64), (3, 80, 32)]


# -- text ------------------------------------------------------------------------------------------


def test_the_first_bos_is_kept_and_pictures_are_minus_200(tokenizer):
    def plain(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    ids = tokenizer_image_token("Look: <image>\nand <image>", tokenizer)
    assert ids == [1, *plain("Look: "), -200, *plain("\nand "), -200]
    assert tokenizer_image_token("<image>\nHi", tokenizer)[:2] == [1, -200]
    assert tokenizer_image_token("", tokenizer) == [1]
    tensor = tokenizer_image_token("<image>", tokenizer, return_tensors="pt")
    assert tensor.dtype == torch.long and tensor.tolist() == [1, IMAGE_TOKEN_INDEX]
    assert tokenizer_image_token("<image>", tokenizer, image_token_index=7) == [1, 7]
    with pytest.raises(InputError, match="'tf'"):
        tokenizer_image_token("x", tokenizer, return_tensors="tf")


def test_ids_of_whole_prompts_are_upstreams(tokenizer):
    golden = GOLDEN["preprocess"]["v1/image_two_rounds"]
    one, two, three, four = golden["after_preprocess_multimodal"]
    system = GOLDEN["prompts"]["v1"]["system"]
    prompt = f"{system} USER: {one} ASSISTANT: {two}</s>USER: {three} ASSISTANT: {four}</s>"
    assert tokenizer_image_token(prompt, tokenizer) == golden["input_ids"]


@pytest.mark.parametrize("legacy", UPSTREAM_TOKENS["legacy"])
def test_ids_after_a_picture_are_upstreams(legacy, upstream_tokenizer):
    tokenizer = upstream_tokenizer(legacy)
    golden = zip(UPSTREAM_TOKENS["prompts"], UPSTREAM_TOKENS["legacy"][legacy], strict=True)
    for prompt, ids in golden:
        assert tokenizer_image_token(prompt, tokenizer) == ids, prompt


def test_the_space_before_a_chunk_does_not_swallow_the_one_it_begins_with(upstream_tokenizer):
    ids = tokenizer_image_token(
        "USER: Compare <image> please. ASSISTANT:", upstream_tokenizer("false")
    )
    assert ids[ids.index(1110) :][:4] == [1110, IMAGE_TOKEN_INDEX, 1110, 276]


def test_what_is_no_text_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"half a character in ' strawberry \\ud83c'"):
        tokenizer_image_token("<image> strawberry \ud83c", tokenizer)
    with pytest.raises(InputError, match=r"half a character in 'caf\\udce9'"):  # of a command line
        tokenizer_image_token("caf\udce9", tokenizer)


def test_bytes_as_tokens_get_no_space():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = tokenizer_image_token("a<image> b", tokenizer)
    assert ids == [alphabet.index("a"), IMAGE_TOKEN_INDEX, *map(alphabet.index, "\u0120b")]


def test_image_tokens_are_repeated_and_never_learnt():
    ids = torch.tensor([1, -200, 5, -200, 6])
    labels = torch.tensor([-100, -200, 5, -100, 6])
    expanded, expanded_labels = expand_image_tokens(ids, labels, 3)
    assert expanded.tolist() == [1, -200, -200, -200, 5, -200, -200, -200, 6]
    skip = IGNORE_INDEX
    assert expanded_labels.tolist() == [skip, skip, skip, skip, 5, skip, skip, skip, 6]
    assert expand_image_tokens(ids, None, [1, 2])[0].tolist() == [1, -200, 5, -200, -200, 6]
    assert expand_image_tokens(torch.tensor([1, 2]), None, 4)[0].tolist() == [1, 2]
    with pytest.raises(InputError, match="1 pictures were given for 2 image tokens"):
        expand_image_tokens(ids, None, [3])


@pytest.mark.parametrize("path, name", GOLDEN["model_name"].items())
def test_model_names(path, name):
    assert get_model_name_from_path(path) == name


def test_a_bare_checkpoint_folder_keeps_its_name():
    assert get_model_name_from_path("checkpoint-5") == "checkpoint-5"


def test_keywords_stop_each_row_by_itself(tokenizer):
    def ids(*texts):
        rows = [
            tokenizer(t, add_special_tokens=False, return_tensors="pt").input_ids for t in texts
        ]
        return torch.nn.utils.rnn.pad_sequence([r[0] for r in rows], batch_first=True)

    prompt = ids("say ### please", "say ### please")
    stop = KeywordsStoppingCriteria(["###", "</s>"], tokenizer, prompt)
    new = ids("a cat", "a cat")
    assert stop(torch.cat([prompt, new], dim=1), None).tolist() == [False, False]
    assert stop(new, None).tolist() == [False, False]
    assert stop(ids("a cat###", "a cat </s>"), None).tolist() == [True, True]
    two = torch.nn.utils.rnn.pad_sequence(
        [ids("a cat of###")[0], ids("a cat of it")[0]], batch_first=True, padding_side="left"
    )
    assert stop(two, None).tolist() == [True, False]
    assert stop(torch.cat([prompt, two], dim=1), None).tolist() == [True, False]
    assert stop(prompt, None).tolist() == [False, False]
    # A keyword that was spelt in bytes, one token each, is found too.
    spelt = torch.tensor([[tokenizer.convert_tokens_to_ids("<0x23>")] * 3])
    assert KeywordsStoppingCriteria(["###"], tokenizer, prompt[:1])(spelt, None).item()
