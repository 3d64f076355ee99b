"""Votes side by side."""

from __future__ import annotations

import json

from llava.serve.ui import compare
from llava.serve.ui.chat_state import (
    Turn,
    conversation_of,
)
from llava.serve.ui.feedback_log import FeedbackLog
from llava.serve.ui.worker_client import Worker
from tests.llava.serve.ui.conftest import typed


def answered(model: str, text: str, *files) -> list[Turn]:
    turn = typed(text, *files)
    turn.model, turn.answer = model, f"{model} says"
    turn.conversation = conversation_of([turn], Worker(model, "", "v1"))
    return [turn]


def test_a_vote_side_by_side_is_one_line_of_an_arenas_log(tmp_path, pictures):
    log = FeedbackLog(tmp_path)

    def lines() -> list[dict]:
        return [json.loads(x) for p in tmp_path.glob("*.json") for x in p.open()]

    talks = {model: answered(model, "What?", pictures / "0.png") for model in "abcd"}
    compare.cast(log, 1, ["b", "a"], talks, True, "127.0.0.1")
    for place in (0, 1, compare.MAX_COLUMNS):
        compare.cast(log, place, ["b", "a"], talks, True, "127.0.0.1")
    [line] = lines()
    assert (line["type"], line["models"], line["best"]) == ("rightvote", ["b", "a"], "a")
    assert line["anonymous"] is True
    assert line["ip"] == "127.0.0.1"
    said = [state["messages"][1][1] for state in line["states"]]
    [stored] = (tmp_path / "serve_images").glob("*/*.jpg")
    assert said == ["b says", "a says"]
    assert line["images"] == [[stored.stem]] * 2

    def kind_of(place: int, order: str) -> tuple[str, str | None]:
        talks.update({model: answered(model, "What?") for model in order})
        compare.cast(log, place, list(order), talks, False, "")
        return lines()[-1]["type"], lines()[-1]["best"]

    assert kind_of(0, "ab") == ("leftvote", "a")
    assert kind_of(2, "dcba") == ("bestvote", "b")
    assert kind_of(compare.MAX_COLUMNS, "abc") == ("tievote", None)
    assert kind_of(compare.MAX_COLUMNS + 1, "ab") == ("bothbad_vote", None)
    assert len(lines()) == 5
    assert not any(line["anonymous"] for line in lines()[1:])


def test_only_answers_to_one_question_are_voted_on():
    talks = {"a": answered("a", "What?"), "b": answered("b", "What?"), "c": answered("c", "Who?")}
    assert compare.comparable(["a", "b"], talks)
    assert not compare.comparable(["a"], talks)
    assert not compare.comparable([], {})
    assert not compare.comparable(["a", "c"], talks)
    assert not compare.comparable(["a", "d"], talks)
    talks["b"][0].answer = ""
    assert not compare.comparable(["a", "b"], talks)
