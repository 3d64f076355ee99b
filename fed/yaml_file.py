"""A YAML file as values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava.errors import InputError


def read_yaml(path: str | Path, flag: str = "") -> Any:
    """The document in a file; `flag` opens messages.

    Raises:
        InputError: a file that cannot be read, or is not YAML.
    """
    import yaml

    where = f"{flag} {path}".lstrip()
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{where}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: not YAML ({error})") from None
