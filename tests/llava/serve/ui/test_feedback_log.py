"""The log that upstream's tools read."""

from __future__ import annotations

import datetime
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from llava.serve.ui.chat_state import (
    conversation_of,
)
from llava.serve.ui.feedback_log import FeedbackLog
from llava.serve.ui.worker_client import Worker
from tests.llava.serve.ui.conftest import typed


def test_the_log_is_upstreams_and_its_lines_stay_whole(tmp_path, pictures):
    turns = [typed("What?", pictures / "0.png")]
    turns[0].conversation, turns[0].model = conversation_of(turns, Worker("m", "", "v1")), "m"
    log = FeedbackLog(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(log.write, "upvote", turns, "127.0.0.1") for _ in range(40)]:
            done.result()
    today = datetime.date.today().isoformat()
    lines = [json.loads(x) for x in (tmp_path / f"{today}-conv.json").read_text().splitlines()]
    assert len(lines) == 40
    assert {"tstamp", "type", "model", "state", "ip"} <= set(lines[0])
    assert (lines[0]["type"], lines[0]["model"], lines[0]["ip"]) == ("upvote", "m", "127.0.0.1")
    assert lines[0]["state"]["messages"] == [["USER", "<image>\nWhat?"], ["ASSISTANT", None]]
    pixels = Image.open(pictures / "0.png").convert("RGB").tobytes()
    [stored] = (tmp_path / "serve_images" / today).iterdir()
    assert stored.name == f"{hashlib.md5(pixels).hexdigest()}.jpg"
    assert Image.open(stored).format == "JPEG"
    assert lines[0]["images"] == [stored.stem]
