"""The log of conversations and votes, in upstream's format: a line of JSON each.

FOLDER/DATE-conv.json has `tstamp`, `type` (chat, upvote, downvote, flag), `model`, `state` (the
conversation), `images` and `ip`; the pictures lie as FOLDER/serve_images/DATE/MD5.jpg. A vote side
by side is an arena's line: `models`, `states` and `images` by column, the type leftvote, rightvote
(of two), bestvote (of more), tievote or bothbad_vote; `best`, a model or null; `anonymous`, whether
names were hidden.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from llava.atomic import atomic_write
from llava.serve.ui.chat_state import Turn, images_of


class FeedbackLog:
    """The log in a folder. Pages in several processes may write to one."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self._lock = threading.Lock()

    def write(self, kind: str, turns: list[Turn], ip: str) -> None:
        """Add a line on the last turn, and its conversation's pictures."""
        today = datetime.date.today().isoformat()
        self._add(today, kind, ip, self._about(turns, today))

    def write_vote(
        self, kind: str, columns: list[list[Turn]], best: str | None, anonymous: bool, ip: str
    ) -> None:
        """Add a line on the last turns of several models, and their pictures."""
        today = datetime.date.today().isoformat()
        each = [self._about(turns, today) for turns in columns]
        about = {
            "models": [one["model"] for one in each],
            "states": [one["state"] for one in each],
            "images": [one["images"] for one in each],
            "best": best,
            "anonymous": anonymous,
        }
        self._add(today, kind, ip, about)

    def _about(self, turns: list[Turn], today: str) -> dict[str, Any]:
        with self._lock:
            images = [self._keep(image, today) for image in images_of(turns)]
        last = turns[-1]
        assert last.conversation is not None  # its answer is there
        return {"model": last.model, "state": last.conversation.dict(), "images": images}

    def _add(self, today: str, kind: str, ip: str, about: dict[str, Any]) -> None:
        line = {"tstamp": round(time.time(), 4), "type": kind, **about, "ip": ip}
        self.folder.mkdir(parents=True, exist_ok=True)
        flags = os.O_APPEND | os.O_CREAT | os.O_WRONLY
        file = os.open(self.folder / f"{today}-conv.json", flags, 0o644)
        try:  # one write, so that lines of several writers do not mix
            os.write(file, (json.dumps(line) + "\n").encode())
        finally:
            os.close(file)

    def _keep(self, image: str, today: str) -> str:
        from llava.pictures import load_image_from_base64

        picture = load_image_from_base64(image)
        name = hashlib.md5(picture.tobytes(), usedforsecurity=False).hexdigest()
        path = self.folder / "serve_images" / today / f"{name}.jpg"
        if not path.exists():
            with atomic_write(path) as file:
                picture.save(file, format="jpeg")
        return name
