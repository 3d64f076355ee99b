"""From what is typed to a prompt, its pictures, and the answers of several models."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import re
import threading

import numpy as np
import pytest
from PIL import Image

from llava.constants import MAX_PIXELS
from llava.serve.ui.chat_state import (
    PREPROCESS,
    Turn,
    chatbot_messages,
    conversation_of,
    fill,
    images_of,
)
from llava.serve.ui.overlay import overlay
from llava.serve.ui.worker_client import Options, PageError, Worker, WorkerClient
from tests.llava.serve.conftest import running
from tests.llava.serve.ui.conftest import Upstream, ask, breaks, says, typed


def test_a_typed_image_tag_is_text_and_is_shown_as_typed(pictures):
    turns = [typed("Is <image> a tag?", pictures / "0.png")]
    turns[0].answer = "<image> is"
    turns.append(typed("sure?"))
    turns[0].done = True
    prompt = conversation_of(turns, Worker("m", "", "v1")).get_prompt()
    assert prompt.count("<image>") == 1 == len(images_of(turns))
    assert "Is &lt;image&gt; a tag?" in [message["content"] for message in chatbot_messages(turns)]


def test_the_worker_says_how_its_prompts_are_made(pictures):
    turns = [typed("a", pictures / "0.png", pictures / "1.png")]
    chatml = conversation_of(turns, Worker("m", "", "chatml_direct"))
    assert "user\n<image>\n<image>\na<|im_end|>" in chatml.get_prompt()
    mmtag = conversation_of([typed("", pictures / "0.png")], Worker("m", "", "v1_mmtag"))
    assert "USER: <Image><image></Image> ASSISTANT:" in mmtag.get_prompt()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_cannot_be_sent_is_said_by_name(tmp_path):
    (tmp_path / "notes.png").write_text("no picture")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "vast.png")
    assert MAX_PIXELS < 10_000**2
    for name, message in (
        ("notes.png", "notes.png cannot be read: cannot identify it as a picture."),
        (
            "vast.png",
            "vast.png cannot be read: 10000 x 10000 pixels; at most 64 million are taken.",
        ),
    ):
        with pytest.raises(PageError, match=f"^{re.escape(message)}$"):
            typed("what?", tmp_path / name)
    with pytest.raises(PageError, match="Type a question"):
        typed("  ")
    with pytest.raises(PageError, match="half an emoji"):
        typed("what? \ud83c")


@pytest.mark.parametrize("size", [(1400, 1), (1, 5000)])
@pytest.mark.parametrize("preprocess", PREPROCESS)
def test_a_thin_picture_can_be_sent(tmp_path, size, preprocess):
    Image.new("RGB", size, "red").save(tmp_path / "line.png")
    turn = Turn.of({"text": "what?", "files": [str(tmp_path / "line.png")]}, preprocess)
    sent = Image.open(io.BytesIO(base64.b64decode(turn.images[0])))
    square = {"Pad": (672, 672), "Resize": (336, 336)}.get(preprocess)
    assert sent.size == (square or tuple(min(side, 1344) for side in size))
    for fit in ("pad", "crop", "stretch"):
        assert overlay(sent, [[1, 0], [0, 1]], fit).size == sent.size


def test_an_upload_is_set_upright_and_deep_grey_is_grey(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    scan = Image.fromarray(np.full((20, 30), 100 * 257, np.uint16))
    scan.save(tmp_path / "scan.png", exif=exif)
    turn = typed("what?", tmp_path / "scan.png")
    sent = Image.open(io.BytesIO(base64.b64decode(turn.images[0])))
    assert sent.size == (20, 30)
    assert sent.getcolors() == [(600, (100, 100, 100))]


def test_a_turn_without_an_answer_is_not_part_of_the_next_prompt(pictures):
    turns = [typed("lost", pictures / "0.png"), typed("now")]
    turns[0].trouble = "the worker stopped"
    assert "lost" not in conversation_of(turns, Worker("m", "", "v1")).get_prompt()
    assert images_of(turns) == []


def test_models_are_asked_at_once_and_one_that_fails_fails_alone():
    there = {name: threading.Event() for name in "ab"}

    def meets(name: str, other: str):
        async def script(body):
            there[name].set()
            assert await asyncio.to_thread(there[other].wait, 60), "asked one after the other"
            yield name, 0

        return script

    upstream = Upstream(a=meets("a", "b"), b=meets("b", "a"), c=breaks, d=says("no", code=1))
    columns = {name: [typed("hello")] for name in "abcd"}
    with running(upstream.app()) as address:
        ask(address, columns)
    assert [columns[n][0].answer for n in "abcd"] == ["a", "b", "half an", ""]
    assert [bool(columns[n][0].trouble) for n in "abcd"] == [False, False, True, True]


def test_a_page_that_is_gone_hangs_up_on_all_workers():
    gone = {name: threading.Event() for name in "ab"}

    def endless(name: str):
        async def script(body):
            try:
                yield "word", 0
                await asyncio.sleep(3600)
            finally:
                gone[name].set()

        return script

    columns = {name: [typed("hello")] for name in "ab"}
    with running(Upstream(a=endless("a"), b=endless("b")).app()) as address:

        async def leaves():
            async with contextlib.aclosing(fill(WorkerClient(address), columns, Options())) as news:
                async for _ in news:
                    if all(turns[0].answer for turns in columns.values()):
                        break

        asyncio.run(leaves())
        assert all(event.wait(60) for event in gone.values())
