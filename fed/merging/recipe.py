"""Settings of a merge from a YAML file and flags.

```yaml
method: ties
experts:                    # paths, relative to this file
  - topic/food
  - {path: topic/birds, weight: 2}
base: start/mm_projector.bin
options: {density: 0.3}
output: merged
```

The keys are the names of the flags. As in clients.yaml, paths are relative to the file; a name that
is no file or folder there stays as it is, and may be one of the hub's.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from fed.merging.config import Settings
from llava.errors import InputError

_PATHS = ("base", "config", "image_folder", "model_base")


def settings(path: str | None, flags: Mapping[str, Any]) -> Settings:
    """Settings from a YAML file, if any, and the flags that were given, which are stronger.

    Options are stronger one by one; `--experts` replaces the file's experts with their weights.

    Raises:
        InputError: no readable YAML, an unknown key, a value of another type, or settings that no
            merge can have.
    """
    values: dict[str, Any] = {} if path is None else _read(Path(path))
    flags = dict(flags)
    if "experts" in flags:
        values.pop("weights", None)
    flags["options"] = {**pairs(values.get("options")), **pairs(flags.get("options"))}
    values |= flags
    if not values.get("experts"):
        raise InputError("--experts is missing: two or more models or projector files")
    for name in ("experts", "calibration_data"):
        values[name] = tuple(values.get(name) or ())
    weights = values.get("weights")
    values["weights"] = None if weights is None else tuple(weights)
    return Settings(**values)


def pairs(options: Mapping[str, Any] | Sequence[str] | None) -> dict[str, Any]:
    """Options by name, of a mapping or of texts name=value; the method checks their types."""
    if isinstance(options, Mapping):
        return dict(options)
    found: dict[str, str] = {}
    for word in options or ():
        name, equals, value = str(word).partition("=")
        if not equals:
            raise InputError(f"--options {word}: expected name=value")
        if name in found:
            raise InputError(f"--options: {name} is given twice")
        found[name] = value
    return found


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML ({error})") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: keys and values are expected")
    known = {one.name: one for one in fields(Settings)}
    values: dict[str, Any] = {}
    for key, value in document.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f" (did you mean {' or '.join(near)}?)" if near else ""
            raise InputError(f"{path}: unknown key {key!r}{hint}")
        values[name] = _typed(f"{path}: {key}", name, value, known[name].default)
    if "experts" in values:
        values |= _experts(path, values)
    for name in _PATHS:
        if values.get(name):
            values[name] = _beside(path, values[name])
    if "calibration_data" in values:
        values["calibration_data"] = [_beside(path, one) for one in values["calibration_data"]]
    if values.get("output"):
        values["output"] = str(path.parent / Path(values["output"]).expanduser())
    return values


def _typed(what: str, name: str, value: Any, default: Any) -> Any:
    """A YAML value, refused where it is not of the flag's type."""
    if name == "options":
        fits, expected = value is None or isinstance(value, dict | list), "names and values"
    elif name == "weights":
        fits = isinstance(value, list) and all(type(one) in (int, float) for one in value)
        expected = "a list of numbers"
    elif name == "experts":
        fits, expected = isinstance(value, list), "a list"
    elif name == "calibration_data":
        value = [value] if isinstance(value, str) else value
        fits = isinstance(value, list) and all(isinstance(one, str) for one in value)
        expected = "a list of files"
    elif isinstance(default, bool):
        fits, expected = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        fits, expected = type(value) is int, "a whole number"
    else:
        fits, expected = value is None or isinstance(value, str), "text"
    if not fits:
        raise InputError(f"{what}: {expected} expected, found {value!r}")
    return value


def _experts(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """`experts` as paths, and `weights`, of a list of paths or of {path, weight}."""
    found, weights = [], []
    for number, entry in enumerate(values["experts"], 1):
        entry = {"path": entry} if isinstance(entry, str) else entry
        where = f"{path}: expert {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise InputError(f"{where}: a path, or {{path, weight}}, is expected, found {entry!r}")
        if unknown := sorted(map(str, entry.keys() - {"path", "weight"})):
            raise InputError(f"{where}: unknown key {unknown[0]!r}; path and weight are known")
        weight = entry.get("weight")
        if weight is not None and type(weight) not in (int, float):
            raise InputError(f"{where}: weight is {weight!r}, a number is expected")
        found.append(_beside(path, entry["path"]))
        weights.append(weight)
    if any(weight is not None for weight in weights):
        if "weights" in values:
            raise InputError(f"{path}: weights are given both by themselves and with the experts")
        return {"experts": found, "weights": [1.0 if w is None else float(w) for w in weights]}
    return {"experts": found}


def _beside(path: Path, name: str) -> str:
    there = path.parent / Path(name).expanduser()
    return str(there) if there.exists() else name
