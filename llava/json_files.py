"""JSON files, read with one clear error."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from llava.errors import InputError


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object in a file; `InputError` if it is missing, broken, or no object."""
    value = read_any_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON object is expected, found a {type(value).__name__}")
    return value


def read_any_json(path: str | os.PathLike) -> Any:
    """The JSON value in a file; `InputError` if it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: no readable JSON ({error})") from None
