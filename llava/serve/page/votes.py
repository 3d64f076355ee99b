"""What people asked, and how they liked the answers: upstream's log, a line of JSON each.

FOLDER/DATE-conv.json has `tstamp`, `type` (chat, upvote, downvote, flag), `model`, `state` (the
conversation) and `ip`; the pictures lie as FOLDER/serve_images/DATE/MD5.jpg.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import threading
import time
from pathlib import Path

from llava.atomic import atomic_write
from llava.serve.page.turns import Turn, images_of


class Log:
    """The log in a folder. Pages in several processes may write to one."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self._lock = threading.Lock()

    def write(self, kind: str, turns: list[Turn], ip: str) -> None:
        """Add a line on the last turn, and its conversation's pictures."""
        today = datetime.date.today().isoformat()
        with self._lock:
            images = [self._keep(image, today) for image in images_of(turns)]
        line = {
            "tstamp": round(time.time(), 4),
            "type": kind,
            "model": turns[-1].model,
            "state": turns[-1].conversation.dict(),
            "images": images,
            "ip": ip,
        }
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
