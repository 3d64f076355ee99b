"""Upstream's wire format, from both ends."""

from __future__ import annotations

import json

import pytest

from llava.errors import InputError
from llava.serve import protocol
from tests.conftest import GOLDEN

UPSTREAM = (  # two objects as upstream's worker writes them: its keys, ASCII JSON, a zero byte each
    b'{"text": "USER: Hi ASSISTANT: caf\\u00e9", "error_code": 0}\x00'
    b'{"text": "USER: Hi ASSISTANT: caf\\u00e9 noir", "error_code": 0}\x00'
)
GOOD = {"model": "m", "prompt": "<image>\nHi", "images": ["QUJD"], "temperature": 0.2,
        "top_p": 0.7, "max_new_tokens": 512, "stop": "</s>"}  # fmt: skip


def test_objects_are_read_wherever_the_bytes_are_cut_and_written_as_upstream_does():
    for size in range(1, len(UPSTREAM)):
        pieces = [UPSTREAM[i : i + size] for i in range(0, len(UPSTREAM), size)]
        found = list(protocol.read_chunks(pieces))
        assert [c["text"][-9:] for c in found] == ["ANT: café", "café noir"]
    assert b"".join(protocol.chunk(**c) for c in found) == UPSTREAM
    assert list(protocol.read_chunks([UPSTREAM[:-1]])) == found[:1]


def test_what_upstreams_own_worker_answered_is_read():
    """Recorded; `images` is their number, the pictures are left out."""
    recorded = json.loads((GOLDEN / "upstream_serve.json").read_text())
    assert recorded["status"].keys() == {"model_names", "speed", "queue_length"}
    found = {}
    for exchange in recorded["exchanges"]:
        data = exchange["response"].encode("latin-1")
        chunks = found[exchange["title"]] = list(protocol.read_chunks([data]))
        whole = [protocol.chunk(c["text"], c["error_code"]) for c in chunks]
        assert b"".join(whole) == data  # ours would be the same bytes
        body = exchange["request"]
        body["images"] = [""] * body["images"]
        if exchange["title"] != "two pictures for one tag":
            assert protocol.read_request(body).prompt == body["prompt"]
    prompt = recorded["exchanges"][0]["request"]["prompt"]
    texts = [c["text"].removeprefix(prompt) for c in found["a question"]]
    assert all(b.startswith(a) for a, b in zip(texts, texts[1:], strict=False))
    assert texts[-1] == "cat with flash"
    assert [c["error_code"] for c in found["two pictures for one tag"]] == [protocol.ERROR_MODEL]


def test_a_question_with_all_fields_and_one_with_the_least():
    request = protocol.read_request(GOOD)
    assert request == protocol.Request("m", "<image>\nHi", ("QUJD",), 0.2, 0.7, 512, "</s>")
    least = protocol.read_request({"prompt": "Hi"})
    assert least == protocol.Request("", "Hi", (), 1.0, 1.0, 256, None)
    assert protocol.read_request(GOOD | {"max_new_tokens": 10**9}).max_new_tokens == 1024
    assert protocol.read_request(GOOD | {"stop": None, "top_p": None}).top_p == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " \n", "images": []}, "prompt is empty"),
        ({"prompt": 3}, "prompt: int was sent, str is expected"),
        ({"prompt": "x" * 10_000_000, "images": []}, "10,000,000 characters; at most 1,000,000"),
        ({"images": []}, "0 pictures were sent, the prompt has 1 <image> tags"),
        ({"images": ["QUJD"] * 2}, "2 pictures were sent"),
        ({"images": "QUJD"}, "images: str was sent"),
        ({"images": [1]}, "list of base64"),
        ({"temperature": -0.1}, "temperature is '-0.1'; a number from 0 on"),
        ({"temperature": float("nan")}, "temperature is 'nan'"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_p": 0}, "top_p is '0'; a number over 0, at most 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is '0'; a number of at least 1"),
        ({"stop": 5}, "stop: int was sent"),
    ],
)
def test_a_bad_question_is_refused_with_the_field_named(changes, message):
    with pytest.raises(InputError, match=message):
        protocol.read_request(GOOD | changes)


def test_what_is_no_question_at_all():
    with pytest.raises(InputError, match="JSON object, this is list"):
        protocol.read_request([])
    for data in (b"\xff", b"{", b"[" * 100_000):
        with pytest.raises(InputError, match="not JSON"):
            protocol.read_json(data)
    with pytest.raises(InputError, match=r"half a character in 'strawberry \\ud83c'"):
        protocol.read_json(b'{"prompt": "strawberry \\ud83c"}')
    assert protocol.read_json(b'{"prompt": "\\ud83c\\udf53"}') == {"prompt": "\U0001f353"}
