"""Answers and failures of controller and workers, as the page gets them."""

from __future__ import annotations

import asyncio
import base64
import io

import pytest
from PIL import Image

from llava.conversation import get_template
from llava.serve.ui.chat_state import (
    Turn,
    chatbot_messages,
)
from llava.serve.ui.worker_client import Options, PageError, WorkerClient
from tests.llava.serve.conftest import running
from tests.llava.serve.ui.conftest import Upstream, ask, breaks, says, typed


def test_an_upstream_worker_is_asked_as_upstreams_page_asks(pictures):
    upstream = Upstream(**{"llava-v1.5-7b": says("A", "A cat")})
    with running(upstream.app()) as address:
        turns = [typed("What is this?", pictures / "0.png")]
        ask(address, {"llava-v1.5-7b": turns}, Options(0.3, 0.9, 7))
        turns.append(typed("And these?", pictures / "1.png", pictures / "2.png"))
        ask(address, {"llava-v1.5-7b": turns})
    first, second = upstream.asked
    system = get_template("llava_v1").system  # what upstream takes for a model of this name
    assert turns[0].answer == "A cat"
    assert not turns[0].trouble
    assert first == {
        "model": "llava-v1.5-7b",
        "prompt": f"{system} USER: <image>\nWhat is this? ASSISTANT:",
        "images": turns[0].images,
        "temperature": 0.3,
        "top_p": 0.9,
        "max_new_tokens": 7,
        "stop": "</s>",
    }
    talk = (
        "<image>\nWhat is this? ASSISTANT: A cat</s>USER: <image>\n<image>\nAnd these? ASSISTANT:"
    )
    assert second["prompt"] == f"{system} USER: {talk}"
    assert second["images"] == turns[0].images + turns[1].images
    sent = [Image.open(io.BytesIO(base64.b64decode(image))) for image in second["images"]]
    for i, picture in enumerate(sent):
        assert picture.tobytes() == Image.open(pictures / f"{i}.png").convert("RGB").tobytes()


def trouble_with(model: str, upstream: Upstream) -> Turn:
    turns = [typed("hello")]
    with running(upstream.app()) as address:
        ask(address, {model: turns})
    return turns[0]


def test_upstreams_high_traffic_is_never_passed_on():
    traffic = "**NETWORK ERROR DUE TO HIGH TRAFFIC. PLEASE REGENERATE OR REFRESH THIS PAGE.**"
    turn = trouble_with("m", Upstream(m=says(traffic, code=1)))
    assert "TRAFFIC" not in turn.trouble.upper()
    assert "m did not answer (error 1)" in turn.trouble


def test_a_workers_own_words_are_passed_on():
    turn = trouble_with("m", Upstream(m=says("the prompt is longer than the context", code=1)))
    assert turn.trouble == "the prompt is longer than the context"
    assert not turn.answer


def test_a_worker_that_stops_in_the_middle_leaves_its_words_and_a_message():
    turn = trouble_with("m", Upstream(m=breaks))
    assert turn.answer == "half an"
    assert "stopped in the middle" in turn.trouble
    assert [m["content"] for m in chatbot_messages([turn])][1:] == [
        "half an",
        f"**!** {turn.trouble}",
    ]


def test_no_worker_no_model_and_no_controller_are_told_apart():
    assert "No worker serves m now" in trouble_with("m", Upstream()).trouble
    assert trouble_with("", Upstream()).trouble == "Choose a model first."
    turns = [typed("hello")]
    ask("http://127.0.0.1:9", {"m": turns})
    assert "The controller at http://127.0.0.1:9 does not answer" in turns[0].trouble


def test_where_nothing_is_served_it_says_what_to_do():
    with running(Upstream().app()) as address, pytest.raises(PageError) as told:
        asyncio.run(WorkerClient(address).models())
    assert str(told.value).startswith(f"The controller at {address} knows no worker yet. Start one")
    with running(Upstream(b=says("B"), a=says("A")).app()) as address:
        assert asyncio.run(WorkerClient(address).models()) == ["a", "b"]


def test_a_worker_that_is_gone_is_named():
    upstream = Upstream(m=says("a"))
    turns = [typed("hello")]
    with running(upstream.app(lambda http, model: "http://127.0.0.1:9")) as address:
        ask(address, {"m": turns})
    assert "The worker of m at http://127.0.0.1:9 does not answer" in turns[0].trouble


def test_an_upstream_worker_cannot_say_what_it_looked_at():
    with running(Upstream(m=says("a")).app()) as address:
        client = WorkerClient(address)

        async def look():
            return await client.attention(await client.worker("m"), "p a", "a", ["x"])

        with pytest.raises(PageError, match="cannot say what the model looked at"):
            asyncio.run(look())
