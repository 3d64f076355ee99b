"""The examples that the page offers."""

from __future__ import annotations

import json
import re

import pytest

from llava.errors import InputError
from llava.serve.ui import examples


def test_examples_lie_beside_their_list(tmp_path, pictures, monkeypatch):
    (tmp_path / "0.png").write_bytes((pictures / "0.png").read_bytes())
    offers = [
        {"image": "0.png", "text": "What?"},
        {"image": [str(pictures / "1.png"), "0.png"]},
        {"text": "Who?"},
    ]
    file = tmp_path / "list.json"
    file.write_text(json.dumps(offers))
    here, other = str(tmp_path / "0.png"), str(pictures / "1.png")
    assert examples.read(str(file)) == [
        {"text": "What?", "files": [here]},
        {"text": "", "files": [other, here]},
        {"text": "Who?", "files": []},
    ]
    file.write_text(json.dumps([*offers[::2], {"image": "packed.png", "text": "And?"}]))
    monkeypatch.setattr(examples, "PLAYGROUND", file)
    assert [each["text"] for each in examples.read(None)] == ["What?", "Who?"]
    monkeypatch.setattr(examples, "PLAYGROUND", tmp_path / "no such")
    assert examples.read(None) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "list.json: no readable JSON"),
        ("{}", "list.json: a JSON list is expected, found a dict"),
        ('[{"text": "a"}, 3]', 'list.json, example 2: {"image": FILE or [FILE, …], "text": QUES'),
        ('[{"image": 3}]', "list.json, example 1: {"),
        ("[{}]", "list.json, example 1: {"),
        (
            '[{"image": "list.json"}]',
            "example 1: list.json cannot be read: cannot identify it as a picture.",
        ),
        ('[{"image": "no.png"}]', "example 1: no.png cannot be read: no such file."),
    ],
)
def test_examples_that_cannot_be_are_one_clear_error(tmp_path, text, message):
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(InputError, match=re.escape(message)):
        examples.read(str(tmp_path / "list.json"))
    with pytest.raises(InputError, match="no such: no readable JSON"):
        examples.read(str(tmp_path / "no such"))
