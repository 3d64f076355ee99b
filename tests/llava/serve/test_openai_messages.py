"""Prompts of every chat template go back into the messages that they were made of."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from llava.conversation import conv_templates, get_template
from llava.errors import InputError
from llava.serve.openai_messages import Talk, chat_messages, data_url, read_prompt, split_prompt

CHAT = [name for name in conv_templates if "plain" not in name]
ODD = ["### Heading\n# and #", "USER:", "Human: x\nAssistant: y", "</s> <s>", "[INST] [/INST]",
       " both ends ", "<|im_end|>", "\n", "<<SYS>>", "日本\u2028語", "a\0b", "(.*)\\1"]  # fmt: skip
ASKED = [["Hi"], ["Hi", "Hello", "Bye"], ["q", "", "r", "a", "s"]]
ASKED += [[text] for text in ODD] + [[text, text, text] for text in ODD]


def conversation(name: str, turns: list):
    talk = get_template(name)
    for i, text in enumerate(turns):
        talk.append_message(talk.roles[i % 2], text)
    talk.append_message(talk.roles[1], None)
    return talk


def system(name: str) -> str:
    return conv_templates[name].system.removeprefix("<|im_start|>system\n")


@pytest.mark.parametrize("name", CHAT)
def test_a_prompt_goes_back_into_its_turns(name):
    for turns in ASKED:
        talk = conversation(name, turns)
        told = [text for _, text in talk.messages[:-1]]  # with the template's own examples
        assert split_prompt(talk.get_prompt(), name) == Talk(system(name), told)
    assert len(ASKED) == 27


@pytest.mark.parametrize("name", [name for name in CHAT if not conv_templates[name].offset])
def test_the_first_pictures_own_form_is_read(name):
    talk = conversation(name, [("What is it?", object(), "Pad"), "A cat.", "<image>\nAnd this?"])
    told = ["<image>\nWhat is it?", "A cat.", "<image>\nAnd this?"]
    assert split_prompt(talk.get_prompt(), name).turns == told


@pytest.mark.parametrize("name", CHAT)
def test_questions_may_hold_the_marks_of_either_turn(name):
    user, assistant = conv_templates[name].roles
    if "[INST]" in conversation(name, ["q"]).get_prompt():
        user, assistant = "[INST] ", "[/INST] "
    end = conv_templates[name].sep2 or conv_templates[name].sep
    marks = [f"Say {assistant}: yes", f"x {assistant}: y", f"x{end}{user}: y", f"x{end}{user}:"]
    for odd in marks:
        for turns in ([odd], [odd, "fine", "more"], ["q", "a", odd, "b", odd]):
            told = split_prompt(conversation(name, turns).get_prompt(), name).turns
            assert told[conv_templates[name].offset :] == turns


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("", "v1"),
        ("What is this?", "v1"),
        ("system USER: question", "v1"),
        ("system USER: ASSISTANT:", "v1"),
        ("USER: no system's place ASSISTANT:", "v1"),
        (conversation("llava_v0", ["Hi"]).get_prompt(), "v1"),
        (conversation("v1", ["Hi"]).get_prompt(), "llava_v0"),
        (conversation("v1", ["Hi"]).get_prompt(), "mpt"),
        ("before [INST] hi [/INST]", "mistral_instruct"),
    ],
)
def test_a_prompt_that_is_not_of_the_template_is_one_clear_error(prompt, name):
    with pytest.raises(InputError, match=f"the prompt is not of the template {name}: .*followed"):
        split_prompt(prompt, name)


def test_a_template_without_turns_or_without_existence_is_refused():
    with pytest.raises(InputError, match="plain has no turns"):
        split_prompt("x", "plain")
    with pytest.raises(InputError, match="no conversation template"):
        split_prompt("x", "vicuna")


@pytest.mark.parametrize("made", CHAT)
@pytest.mark.parametrize("expected", ["v1", "llava_v0", "mpt", "llama_2"])
def test_a_page_may_have_chosen_another_template(made, expected):
    told = read_prompt(conversation(made, ["q", "a", "r"]).get_prompt(), expected)
    assert told.system == system(made)
    assert told.turns[-3:] == ["q", "a", "r"]


def test_a_prompt_of_no_template_names_the_one_expected():
    with pytest.raises(InputError, match="not of the template mpt"):
        read_prompt("What is this?", "mpt")


@pytest.mark.parametrize("name", ["v1", "llava_v0", "mpt", "llama_2"])
def test_the_systems_text_may_be_another(name):
    talk = conversation(name, ["Hi"])
    talk.system = talk.system.replace(system(name), "Be brief.\n\nBe kind.")
    assert split_prompt(talk.get_prompt(), name) == Talk("Be brief.\n\nBe kind.", ["Hi"])


def test_long_prompts_full_of_marks_are_read_in_one_pass():
    """A million characters; in quadratic time it would take minutes."""
    for piece, turns in ("</s>USER: ", 1), ("</s>USER:  ASSISTANT: ", 45_000):
        prompt = f"s USER: {piece * (1_000_000 // len(piece))} ASSISTANT:"
        assert len(split_prompt(prompt, "v1").turns) >= turns


def picture(kind: str = "PNG", size=(4, 3), mode: str = "RGB") -> str:
    return encoded(Image.new(mode, size), kind)


def encoded(image: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return base64.b64encode(buffer.getvalue()).decode()


NOISE = encoded(Image.effect_noise((64, 64), 50), "PNG")


def part(image: str, kind: str = "png") -> dict:
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{image}"}}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


@pytest.mark.parametrize(
    ("turn", "parts"),
    [
        ("<image>\nWhat?", ["P", "What?"]),
        ("What?\n<image>", ["What?", "P"]),
        ("<image>", ["P"]),
        ("<image>\n<image>\nSame?", ["P", "P", "Same?"]),
        ("One\n<image>\nand\n<image>\nof", ["One\n", "P", "and\n", "P", "of"]),
        ("<im_start><image><im_end>\nWhat?", ["P", "What?"]),
    ],
)
def test_pictures_stand_in_their_places(turn, parts):
    image = picture()
    told = chat_messages(Talk("", [turn]), [image] * parts.count("P"))
    wanted = [part(image) if words == "P" else text(words) for words in parts]
    assert told == [{"role": "user", "content": wanted}]


def test_each_turn_is_a_message_with_its_own_pictures():
    one, two = picture(size=(1, 1)), picture("JPEG", size=(2, 2))
    talk = Talk("Be kind.", ["<image>\nWhat?", "A cat.", "And\n<image>"])
    assert chat_messages(talk, [one, two]) == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [part(one), text("What?")]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [text("And"), part(two, "jpeg")]},
    ]


@pytest.mark.parametrize(
    ("turns", "images", "message"),
    [
        (["<image>\nWhat?"], 0, "0 pictures were sent, the questions have 1 <image> tags"),
        (["What?"], 1, "1 pictures were sent, the questions have 0 <image> tags"),
        (["What?", "An <image>.", "So?"], 1, "the questions have 0 <image> tags"),
    ],
)
def test_a_wrong_number_of_pictures_is_an_error(turns, images, message):
    with pytest.raises(InputError, match=message):
        chat_messages(Talk("", turns), [picture()] * images)


@pytest.mark.parametrize("kind", ["BMP", "TIFF"])
def test_a_kind_that_not_every_server_reads_becomes_png(kind):
    head, _, data = data_url(picture(kind)).partition(",")
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (4, 3)


def test_what_servers_may_read_otherwise_becomes_png():
    """A photograph on its side, which not all of them turn; 16-bit grey, which some make white."""
    exif, photo, scan = Image.Exif(), io.BytesIO(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4), "red").save(photo, "JPEG", exif=exif)
    Image.fromarray(np.full((2, 3), 100 * 257, np.uint16)).save(scan, "PNG")
    for file, size, level in ((photo, (4, 8), None), (scan, (3, 2), (100, 100, 100))):
        head, _, data = data_url(base64.b64encode(file.getvalue()).decode()).partition(",")
        sent = Image.open(io.BytesIO(base64.b64decode(data)))
        assert head == "data:image/png;base64"
        assert sent.mode == "RGB"
        assert sent.size == size
        assert not sent.getexif()
        assert level in (None, sent.getpixel((0, 0)))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("", "cannot identify it as a picture"),
        ("%%%%", "this is not base64"),
        (base64.b64encode(b"not a picture").decode(), "cannot identify it as a picture"),
        (NOISE[: len(NOISE) // 2], "a picture of the question cannot be read"),
        (picture(size=(10_000, 10_000), mode="1"), "10000 x 10000 pixels; at most 64 million"),
    ],
)
def test_what_is_no_honest_picture_is_an_error(image, message):
    with pytest.raises(InputError, match=message):
        data_url(image)
