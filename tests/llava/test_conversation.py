"""Prompts must be upstream's to the letter: checkpoints were trained on them."""

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from llava.conversation import (
    SeparatorStyle,
    conv_templates,
    default_conversation,
    get_template,
)
from llava.errors import InputError
from llava.squaring import expand2square

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/upstream_golden.json").read_text())[
    "prompts"
]
TURNS = ["<image>\nWhat is this?", "A cat.", "Sure?", "Yes."]


def conversation(key, turns, keep=False):
    conv = get_template(key)
    if not keep:
        conv.messages = []
    for i, text in enumerate(turns):
        conv.append_message(conv.roles[i % 2], text)
    return conv


def test_every_key_is_there():
    assert conv_templates.keys() - {"smollm2"} == GOLDEN.keys()


@pytest.mark.parametrize("key", GOLDEN)
def test_prompts_and_fields_are_upstreams(key):
    golden = dict(GOLDEN[key])
    if golden["sep_style"] == "PLAIN":
        # Upstream raises TypeError once the assistant has spoken (it adds None); we do not.
        golden["train_two_rounds"] = "<image>\nWhat is this?\nA cat.\nSure?\nYes.\n"
    conv = get_template(key)
    assert conversation(key, TURNS).get_prompt() == golden["train_two_rounds"]
    asked = conversation(key, [TURNS[0], None], keep=True)
    assert asked.get_prompt() == golden["infer_first_turn"]
    assert conv.sep_style is SeparatorStyle[golden["sep_style"]]
    assert list(conv.roles) == golden["roles"]
    for field in ("version", "sep", "sep2", "offset", "system"):
        assert getattr(conv, field) == golden[field]


@pytest.mark.parametrize("key", GOLDEN)
def test_exactly_the_assistants_words_and_end_marks_are_answers(key):
    said = [text for text, answer in conversation(key, TURNS).segments() if answer]
    end = GOLDEN[key]["sep2"] or GOLDEN[key]["sep"]
    space = " " if GOLDEN[key]["sep_style"] == "LLAMA_2" else ""
    assert [text.lstrip(" ") for text in said] == [f"A cat.{space}{end}", f"Yes.{space}{end}"]


@pytest.mark.parametrize("key", GOLDEN)
def test_an_empty_answer_ends_and_is_not_learnt(key):
    filled = conversation(key, ["q", "\0", "r", "Yes.", "s"]).segments()
    empty = conversation(key, ["q", "", "r", "Yes.", "s"]).segments()
    assert [text for text, _ in empty] == [text.replace("\0", "") for text, _ in filled]
    assert [text.strip(" ")[:4] for text, answer in empty if answer] == ["Yes."]
    blank = conversation(key, ["q", " \n"]).segments()
    assert not any(answer for _, answer in blank)


def test_no_role_follows_an_empty_turn_at_once():
    prompt = conversation("v1", ["q", "", "", None]).get_prompt()
    assert prompt.endswith("questions. USER: q ASSISTANT: </s>USER:  ASSISTANT:")
    prompt = conversation("llava_llama_2", ["", "", "r", None]).get_prompt()
    assert prompt.endswith("<</SYS>>\n\n [/INST]  </s><s>[INST] r [/INST]")


def test_the_default_is_vicuna_v1():
    assert default_conversation.get_prompt() == get_template("vicuna_v1").get_prompt()


def test_a_copy_does_not_share_turns():
    conv = get_template("v1")
    conv.append_message("USER", "hello")
    assert conv_templates["v1"].messages == []
    copy = conv.copy()
    copy.messages[0][1] = "bye"
    assert conv.messages == [["USER", "hello"]]


def test_an_unknown_template_is_named_with_near_names():
    with pytest.raises(InputError, match="'vicuna_v2'.*vicuna_v1"):
        get_template("vicuna_v2")
    with pytest.raises(InputError, match="known are default, v0"):
        get_template("%%%")


def test_a_picture_message_is_announced_in_front():
    picture = Image.new("RGB", (4, 2))
    conv = get_template("v1")
    conv.append_message("USER", ("what <image> is this?", picture, "Pad"))
    conv.append_message("ASSISTANT", None)
    assert conv.get_prompt().endswith("USER: <image>\nwhat  is this? ASSISTANT:")
    assert conv.dict()["messages"] == [["USER", "what <image> is this?"], ["ASSISTANT", None]]

    conv = get_template("v0_mmtag")
    conv.append_message("Human", ("what is this?", picture, "Pad"))
    assert conv.get_prompt().endswith(
        "###Human: <Image><image></Image>###Assistant: Received.###Human: what is this?###"
    )


def test_pictures_are_prepared_for_the_wire():
    picture = Image.new("RGB", (3000, 300), "red")
    conv = get_template("v1")
    for mode in ("Default", "Resize", "Pad"):
        conv.append_message("USER", ("what is this?", picture, mode))
        conv.append_message("ASSISTANT", "red")
    conv.append_message("USER", "and now?")
    sizes = [image.size for image in conv.get_images(return_pil=True)]
    assert sizes == [(1340, 134), (336, 336), (672, 672)]
    first = Image.open(io.BytesIO(base64.b64decode(conv.get_images()[0])))
    assert first.format == "PNG"
    assert first.size == (1340, 134)
    with pytest.raises(InputError, match="'Shear'"):
        conv.process_image(picture, "Shear")


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("size", "sent"),
    [
        ((1400, 1), (1344, 1)),
        ((100_000, 1), (1344, 1)),
        ((4000, 2), (1344, 1)),
        ((1344, 1), (1344, 1)),
        ((3000, 10), (1200, 4)),
        ((5, 1), (5, 1)),
    ],
)
def test_no_side_shrinks_to_nothing(size, sent, turned):
    """The long side is at most 1344 pixels, the short one at least one."""
    size, sent = (size[::-1], sent[::-1]) if turned else (size, sent)
    conv, picture = get_template("v1"), Image.new("RGB", size)
    for mode in ("Default", "Crop"):
        assert conv.process_image(picture, mode, return_pil=True).size == sent


def test_a_padded_picture_is_shrunk_as_its_square_was():
    noise = Image.effect_noise((1500, 40), 90).convert("RGB")
    square = expand2square(noise, (122, 116, 104)).resize((672, 672))
    found = get_template("v1").process_image(noise, "Pad", return_pil=True)
    difference = ImageChops.difference(found, square)
    assert found.size == (672, 672)
    assert max(high for _, high in difference.getextrema()) <= 1


def test_the_templates_own_examples_hold_no_pictures_to_send():
    conv = get_template("default")
    conv.append_message("Human", ("what?", Image.new("RGB", (4, 4)), "Default"))
    assert len(conv.get_images(return_pil=True)) == 1


def test_pairs_for_a_chatbot():
    conv = get_template("v0")  # with two messages of its own
    conv.append_message(conv.roles[0], ("<image>\nWhat is this?", Image.new("RGB", (8, 4)), "Pad"))
    conv.append_message(conv.roles[1], "A square.")
    conv.append_message(conv.roles[0], "Sure?")
    conv.append_message(conv.roles[1], None)
    first, second = conv.to_gradio_chatbot()
    picture, text = first[0].split(" />")
    data = picture.partition("base64,")[2].partition('"')[0]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (8, 4)
    assert (text, first[1], second) == ("What is this?", "A square.", ["Sure?", None])
