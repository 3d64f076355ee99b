"""Examples to click before the first question: questions with their pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava.errors import InputError, reason
from llava.serve.ui.chat_state import open_picture
from llava.serve.ui.worker_client import PageError

PLAYGROUND = Path(__file__).parents[3] / "playground/examples.json"
"""Not there where the package is installed without its repository; nor its pictures if packed."""


def read(path: str | None) -> list[dict[str, Any]]:
    """Messages for a MultimodalTextbox from `[{"image": FILE or [FILE, …], "text": …}, …]`.

    Args:
        path: the list, to whose folder FILEs are relative; None: the playground's, and of it those
            whose pictures are there.
    """
    file = Path(path or PLAYGROUND).expanduser()
    if path is None and not file.is_file():
        return []
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--examples {file}: no readable JSON ({reason(error)})") from None
    if not isinstance(records, list):
        kind = type(records).__name__
        raise InputError(f"--examples {file}: a JSON list is expected, found a {kind}")
    messages = []
    for place, record in enumerate(records, 1):
        try:
            messages.append(_message(record, file.parent))
        except PageError as error:
            if path is not None:
                raise InputError(f"--examples {file}, example {place}: {error}") from None
    return messages


def _message(record: Any, folder: Path) -> dict[str, Any]:
    of = record if isinstance(record, dict) else {}
    text, images = of.get("text", ""), of.get("image", [])
    images = images if isinstance(images, list) else [images]
    if not (text or images) or not all(isinstance(each, str) for each in (text, *images)):
        raise PageError('{"image": FILE or [FILE, …], "text": QUESTION} is expected')
    files = [str(folder / image) for image in images]
    for file in files:
        open_picture(file)
    return {"text": text, "files": files}
