"""The name of a run: drawn once, and kept in OUTPUT/fed/run.json."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

from llava.atomic import write_text
from llava.json_files import read_json


def run_name(folder: Path) -> str:
    """32 hex digits that no other run has; `folder` is OUTPUT/fed."""
    file = folder / "run.json"
    if not file.exists():
        write_text(file, json.dumps({"run": uuid.uuid4().hex}))
    return read_json(file)["run"]
