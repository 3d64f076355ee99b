import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, LlamaTokenizer

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import InputError
from llava.mm_utils import (
    KeywordsStoppingCriteria,
    expand_image_tokens,
    get_model_name_from_path,
    image_pixels,
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


def test_padding_shows_the_whole_picture_and_square_cuts_its_centre(processor):
    image = Image.new("RGB", (96, 32), "black")
    image.paste((255, 255, 255), (0, 0, 8, 32))  # a white strip at the left edge
    padded = image_pixels(image, processor, SimpleNamespace(image_aspect_ratio="pad"))
    cut = image_pixels(image, processor, SimpleNamespace())
    assert padded.shape == cut.shape == (3, 32, 32)
    black, white = cut.min(), padded.max()
    assert (cut == cut[:, :1, :1]).all()
    assert white > 1.5
    assert black < -1.4
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
    assert tensor.dtype == torch.long
    assert tensor.tolist() == [1, IMAGE_TOKEN_INDEX]
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


@pytest.mark.parametrize(("path", "name"), GOLDEN["model_name"].items())
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
